// The only pybind11 code of the CPU kernels. Tensors arrive as raw pointers, so no torch header is needed here:
// the module builds against any torch, or none. Shapes and dtypes are checked in Python, in fastalign/ops.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/segment_sum.h"

namespace py = pybind11;

namespace {

template <typename T>
void segment_sum(std::uintptr_t values, std::uintptr_t offsets, std::int64_t segments, std::uintptr_t out) {
    py::gil_scoped_release release;
    fastalign::segment_sum(reinterpret_cast<const T*>(values), reinterpret_cast<const std::int64_t*>(offsets), segments,
                           reinterpret_cast<T*>(out));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastalign's C++ kernels for the CPU; called through fastalign.ops.";
    m.attr("compiler") = FASTALIGN_COMPILER;
    m.def("segment_sum_f32", &segment_sum<float>, py::arg("values"), py::arg("offsets"), py::arg("segments"),
          py::arg("out"));
    m.def("segment_sum_f64", &segment_sum<double>, py::arg("values"), py::arg("offsets"), py::arg("segments"),
          py::arg("out"));
}
