// The only pybind11 code of the CUDA kernels. Tensors are passed as raw addresses, and the stream as an integer. So
// neither torch's headers nor CUDA's are needed: the module builds with any torch and imports without a driver.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/ewc.h"
#include "cuda/launchers.h"

namespace py = pybind11;
using namespace fastalign::cuda;

namespace {

// Python sets fields by name. An address of 0 is null.
template <typename Problem, typename Field>
auto address(Field Problem::*field) {
    return [field](Problem& problem, std::uintptr_t at) { problem.*field = reinterpret_cast<Field>(at); };
}
template <typename Problem>
auto dtype(DType Problem::*field) {
    return [field](Problem& problem, int value) { problem.*field = static_cast<DType>(value); };
}

// (factor, inner, outer)
template <typename Problem>
void set_head(Problem& problem, std::tuple<float, float, float> head) {
    problem.head = {std::get<0>(head), std::get<1>(head), std::get<2>(head)};
}

// Defines name(problem, device, stream) in Python. It raises RuntimeError with CUDA's message if a launch fails.
template <typename Problem>
void def_launch(py::module_& m, const char* name, int (*launcher)(Problem, Where)) {
    m.def(name, [launcher](const std::decay_t<Problem>& problem, int device, std::uintptr_t stream) {
        const int error = launcher(problem, {device, reinterpret_cast<void*>(stream)});
        if (error) throw std::runtime_error(error_string(error));
    });
}

void bind_selective_logprobs(py::module_& m) {
    using P = Gather;
    py::class_<P>(m, "Gather", py::module_local())
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
        .def_property("grad_logits", nullptr, address(&P::grad_logits))
        .def_readwrite("grad_stride", &P::grad_stride);
    def_launch(m, "selective_logprobs", &selective_logprobs);
    def_launch(m, "selective_logprobs_backward", &selective_logprobs_backward);
}

void bind_tiles(py::module_& m) {
    using T = Tile;
    py::class_<T>(m, "Tile", py::module_local())
        .def_property("from_dtype", nullptr, dtype(&T::from))
        .def_property("to_dtype", nullptr, dtype(&T::to))
        .def_property("u", nullptr, address(&T::u))
        .def_readwrite("u_stride", &T::u_stride)
        .def_property("targets", nullptr, address(&T::targets))
        .def_readwrite("first", &T::first)
        .def_readwrite("rows", &T::rows)
        .def_readwrite("columns", &T::columns)
        .def_property("bias", nullptr, address(&T::bias))
        .def_property("head", nullptr, &set_head<T>);
    using A = Absorb;
    py::class_<A, T>(m, "Absorb", py::module_local())
        .def(py::init([] { return A{}; }))
        .def_property("shift", nullptr, address(&A::shift))
        .def_property("others", nullptr, address(&A::others))
        .def_property("zothers", nullptr, address(&A::zothers))
        .def_property("target", nullptr, address(&A::target))
        .def_property("e", nullptr, address(&A::e))
        .def_readwrite("e_stride", &A::e_stride)
        .def_property("ze", nullptr, address(&A::ze))
        .def_readwrite("ze_stride", &A::ze_stride)
        .def_property("a", nullptr, address(&A::a))
        .def_readwrite("a_stride", &A::a_stride)
        .def_property("b", nullptr, address(&A::b))
        .def_readwrite("b_stride", &A::b_stride)
        .def_readwrite("width", &A::width)
        .def_property("best", nullptr, address(&A::best))
        .def_property("best_index", nullptr, address(&A::best_index));
    using F = Finish;
    py::class_<F>(m, "Finish", py::module_local())
        .def(py::init([] { return F{}; }))
        .def_property("dtype", nullptr, dtype(&F::dtype))
        .def_property("weight", nullptr, address(&F::weight))
        .def_readwrite("weight_stride", &F::weight_stride)
        .def_property("targets", nullptr, address(&F::targets))
        .def_readwrite("rows", &F::rows)
        .def_readwrite("width", &F::width)
        .def_property("head", nullptr, &set_head<F>)
        .def_property("shift", nullptr, address(&F::shift))
        .def_property("others", nullptr, address(&F::others))
        .def_property("zothers", nullptr, address(&F::zothers))
        .def_property("target", nullptr, address(&F::target))
        .def_property("logprobs", nullptr, address(&F::logprobs))
        .def_property("entropies", nullptr, address(&F::entropies))
        .def_property("at_target", nullptr, address(&F::at_target))
        .def_property("slope", nullptr, address(&F::slope))
        .def_property("mean", nullptr, address(&F::mean))
        .def_property("a", nullptr, address(&F::a))
        .def_readwrite("a_stride", &F::a_stride)
        .def_property("b", nullptr, address(&F::b))
        .def_readwrite("b_stride", &F::b_stride);
    using G = Gradient;
    py::class_<G, T>(m, "Gradient", py::module_local())
        .def(py::init([] { return G{}; }))
        .def_property("shift", nullptr, address(&G::shift))
        .def_property("mean", nullptr, address(&G::mean))
        .def_property("logprobs", nullptr, address(&G::logprobs))
        .def_property("entropy", nullptr, address(&G::entropy))
        .def_property("target", nullptr, address(&G::target))
        .def_property("du", nullptr, address(&G::du))
        .def_readwrite("du_stride", &G::du_stride);
    def_launch(m, "absorb", &absorb);
    def_launch(m, "finish", &finish);
    def_launch(m, "softmax_gradient", &softmax_gradient);
    def_launch(m, "kept_gradient", &kept_gradient);
}

void bind_preference_loss(py::module_& m) {
    using P = Preference;
    py::class_<P>(m, "Preference", py::module_local())
        .def(py::init([] { return P{}; }))
        .def_property("logprobs", nullptr, address(&P::logprobs))
        .def_property("offsets", nullptr, address(&P::offsets))
        .def_property("ref_sums", nullptr, address(&P::ref_sums))
        .def_property("lengths", nullptr, address(&P::lengths))
        .def_property("labels", nullptr, address(&P::labels))
        .def_property("kl", nullptr, address(&P::kl))
        .def_readwrite("tokens", &P::tokens)
        .def_readwrite("sequences", &P::sequences)
        .def_readwrite("items", &P::items)
        .def_property("form", nullptr, [](P& p, int form) { p.form = static_cast<LossForm>(form); })
        .def_readwrite("averaged", &P::averaged)
        .def_readwrite("alternating", &P::alternating)
        .def_readwrite("beta", &P::beta)
        .def_readwrite("scale", &P::scale)
        .def_readwrite("offset", &P::offset)
        .def_readwrite("slope", &P::slope)
        .def_property("losses", nullptr, address(&P::losses))
        .def_property("rewards", nullptr, address(&P::rewards))
        .def_property("sums", nullptr, address(&P::sums))
        .def_property("coefficients", nullptr, address(&P::coefficients))
        .def_property("grad_losses", nullptr, address(&P::grad_losses))
        .def_property("grad_sums", nullptr, address(&P::grad_sums))
        .def_property("grad", nullptr, address(&P::grad));
    def_launch(m, "preference_loss", &preference_loss);
    def_launch(m, "preference_loss_backward", &preference_loss_backward);
}

void bind_fisher(py::module_& m) {
    using F = Fisher;
    py::class_<F>(m, "Fisher", py::module_local())
        .def(py::init([] { return F{}; }))
        .def_property("dtype", nullptr, dtype(&F::dtype))
        .def_property("fisher", nullptr, address(&F::fisher))
        .def_property("grad_output", nullptr, address(&F::grad_output))
        .def_property("input", nullptr, address(&F::input))
        .def_readwrite("fisher_stride", &F::fisher_stride)
        .def_readwrite("grad_stride", &F::grad_stride)
        .def_readwrite("input_stride", &F::input_stride)
        .def_property("offsets", nullptr, address(&F::offsets))
        .def_readwrite("tokens", &F::tokens)
        .def_readwrite("sequences", &F::sequences)
        .def_readwrite("rows", &F::out)
        .def_readwrite("columns", &F::in);
    def_launch(m, "accumulate_fisher", &accumulate_fisher);
}

// From a list of (theta, anchor, fisher, grad, size, fresh). The first four are addresses, or 0 for null.
std::vector<HeldTensor> held_tensors(const py::list& rows) {
    std::vector<HeldTensor> out;
    for (const auto& row : rows) {
        const auto [theta, anchor, fisher, grad, size, fresh] = row.cast<
            std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::int64_t, bool>>();
        out.push_back({reinterpret_cast<void*>(theta), reinterpret_cast<void*>(anchor),
                       reinterpret_cast<float*>(fisher), reinterpret_cast<void*>(grad), size, fresh, 0});
    }
    return out;
}

void bind_ewc(py::module_& m) {
    struct Held {
        DType theta, anchor;
        float strength;
        std::vector<HeldTensor> tensors;
        double* sums;
    };
    py::class_<Held>(m, "Held", py::module_local())
        .def(py::init([] { return Held{}; }))
        .def_property("theta_dtype", nullptr, dtype(&Held::theta))
        .def_property("anchor_dtype", nullptr, dtype(&Held::anchor))
        .def_readwrite("strength", &Held::strength)
        .def_property("tensors", nullptr, [](Held& p, const py::list& rows) { p.tensors = held_tensors(rows); })
        .def_property("sums", nullptr, address(&Held::sums));
    m.attr("held_block") = kHeldBlock;
    def_launch<const Held&>(m, "ewc_penalty", +[](const Held& p, Where where) {
        return ewc_penalty(p.theta, p.anchor, p.strength, p.tensors, p.sums, where);
    });
}

void bind_divergence(py::module_& m) {
    using D = Divergence;
    py::class_<D>(m, "Divergence", py::module_local())
        .def(py::init([] { return D{}; }))
        .def_property("kind", nullptr, [](D& p, int kind) { p.kind = static_cast<DivergenceKind>(kind); })
        .def_readwrite("beta", &D::beta)
        .def_property("head", nullptr, &set_head<D>)
        .def_property("a", nullptr, address(&D::a))
        .def_property("b", nullptr, address(&D::b))
        .def_readwrite("a_stride", &D::a_stride)
        .def_readwrite("b_stride", &D::b_stride)
        .def_readwrite("rows", &D::rows)
        .def_readwrite("columns", &D::columns)
        .def_property("bias", nullptr, address(&D::bias))
        .def_property("top", nullptr, address(&D::top))
        .def_property("total", nullptr, address(&D::total))
        .def_property("stats", nullptr, address(&D::stats))
        .def_readwrite("stats_stride", &D::stats_stride)
        .def_property("values", nullptr, address(&D::values))
        .def_property("moments", nullptr, address(&D::moments))
        .def_readwrite("scale", &D::scale)
        .def_property("coefficients", nullptr, address(&D::coefficients))
        .def_property("c", nullptr, address(&D::c))
        .def_property("to_dtype", nullptr, dtype(&D::to))
        .def_readwrite("c_stride", &D::c_stride);
    def_launch(m, "divergence_normalise", &divergence_normalise);
    def_launch(m, "divergence_terms", &divergence_terms);
    def_launch(m, "divergence_gradient", &divergence_gradient);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fastalign's CUDA kernels; called through fastalign.ops.";
    m.attr("compiler") = FASTALIGN_CUDA_COMPILER;
    m.attr("device_type") = FASTALIGN_CUDA_DEVICE;  // "cuda", or "cpu" in the emulation of the tests
#ifdef FASTALIGN_EMULATE_CUDA
    m.def("launches", &launches);
    m.def("last_block_first", &last_block_first);
#endif
    bind_selective_logprobs(m);
    bind_tiles(m);
    bind_preference_loss(m);
    bind_fisher(m);
    bind_ewc(m);
    bind_divergence(m);
}
