// The only pybind11 code of the CUDA kernels. Tensors arrive as raw addresses, the stream as an integer, so neither
// torch's headers nor CUDA's are needed here: the module builds against any torch and imports without a driver.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/launchers.h"

namespace py = pybind11;
using namespace fastalign::cuda;

namespace {

// Fields are set from Python by name; an address of 0 is null.
template <typename Problem, typename Field>
auto address(Field Problem::*field) {
    return [field](Problem& problem, std::uintptr_t at) { problem.*field = reinterpret_cast<Field>(at); };
}
template <typename Problem>
auto dtype(DType Problem::*field) {
    return [field](Problem& problem, int value) { problem.*field = static_cast<DType>(value); };
}

// f(problem, device, stream); RuntimeError with CUDA's words where the launch was refused.
template <typename Problem>
void def_launch(py::module_& m, const char* name, int (*launcher)(const Problem&, Where)) {
    m.def(name, [launcher](const Problem& problem, int device, std::uintptr_t stream) {
        const int error = launcher(problem, {device, reinterpret_cast<void*>(stream)});
        if (error) throw std::runtime_error(error_string(error));
    });
}

void bind_selective_logprobs(py::module_& m) {
    using P = Gather;
    py::class_<P>(m, "Gather")
        .def(py::init([] { return P{}; }))
        .def_property("dtype", nullptr, dtype(&P::dtype))
        .def_property("logits", nullptr, address(&P::logits))
        .def_readwrite("stride", &P::stride)
        .def_property("targets", nullptr, address(&P::targets))
        .def_readwrite("rows", &P::rows)
        .def_readwrite("vocab", &P::vocab)
        .def_readwrite("ignore_index", &P::ignore_index)
        .def_readwrite("factor", &P::factor)
        .def_property("logprobs", nullptr, address(&P::logprobs))
        .def_property("stats", nullptr, address(&P::stats))
        .def_property("grad", nullptr, address(&P::grad))
        .def_property("grad_logits", nullptr, address(&P::grad_logits));
    def_launch(m, "selective_logprobs", &selective_logprobs);
    def_launch(m, "selective_logprobs_backward", &selective_logprobs_backward);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastalign's CUDA kernels; called through fastalign.ops.";
    m.attr("compiler") = FASTALIGN_CUDA_COMPILER;
    m.attr("device_type") = FASTALIGN_CUDA_DEVICE;  // where tensors must lie: "cuda", or "cpu" in the tests' emulation
    bind_selective_logprobs(m);
}
