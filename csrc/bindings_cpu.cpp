// The only pybind11 code of the CPU kernels. Tensors are passed as raw addresses, and torch's thread pool as the
// address of a C function. So no torch header is needed: the module builds with any torch or none, and runs with any
// torch that exports the function. fastalign/ops checks shapes and dtypes in Python.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "cpu/base/workspace.h"
#include "cpu/kernels.h"
#include "cpu/kernels/preference_loss.h"
#include "cpu/kernels/segment_sum.h"
#include "cpu/tiles/brgemm.h"

namespace py = pybind11;
using fastalign::AttentionProblem;
using fastalign::BackwardProblem;
using fastalign::DivergenceProblem;
using fastalign::ForwardProblem;
using fastalign::HeadProblem;
using fastalign::Kernels;
using fastalign::Pool;
using fastalign::SelectiveProblem;

namespace {

template <typename T>
void segment_sum(std::uintptr_t values, std::uintptr_t offsets, std::int64_t segments, std::uintptr_t out) {
    py::gil_scoped_release release;
    fastalign::segment_sum(reinterpret_cast<const T*>(values), reinterpret_cast<const std::int64_t*>(offsets), segments,
                           reinterpret_cast<T*>(out));
}

// Returns false, and writes nothing, if the offsets are wrong.
template <typename T>
bool preference_loss(std::uintptr_t logprobs, std::uintptr_t offsets, std::uintptr_t ref_sums, std::uintptr_t lengths,
                     std::uintptr_t labels, std::uintptr_t kl, std::int64_t tokens, std::int64_t sequences, int form,
                     bool averaged, bool alternating, double beta, double scale, double offset, double slope,
                     std::uintptr_t losses, std::uintptr_t rewards, std::uintptr_t sums, std::uintptr_t coefficients) {
    py::gil_scoped_release release;
    auto at = [](std::uintptr_t address) { return reinterpret_cast<void*>(address); };
    const fastalign::PreferenceProblem problem{
        at(logprobs), reinterpret_cast<const std::int64_t*>(offsets), at(ref_sums), at(lengths),
        reinterpret_cast<const bool*>(labels), at(kl), tokens, sequences, static_cast<fastalign::LossForm>(form),
        averaged, alternating, beta, scale, offset, slope, at(losses), at(rewards), at(sums), at(coefficients)};
    if (!fastalign::offsets_fit(problem.offsets, sequences, tokens)) return false;
    fastalign::PreferencePass<T>{problem}.run();
    return true;
}

template <typename T>
void preference_loss_backward(std::uintptr_t grad_losses, std::uintptr_t grad_sums, std::uintptr_t coefficients,
                              std::uintptr_t offsets, std::int64_t sequences, std::int64_t items, bool alternating,
                              std::uintptr_t out) {
    py::gil_scoped_release release;
    fastalign::preference_loss_backward(reinterpret_cast<const T*>(grad_losses), reinterpret_cast<const T*>(grad_sums),
                                        reinterpret_cast<const T*>(coefficients),
                                        reinterpret_cast<const std::int64_t*>(offsets), sequences, items, alternating,
                                        reinterpret_cast<T*>(out));
}

const Kernels& kernels_named(const std::string& name) {
    for (const Kernels* k : fastalign::available_kernels())
        if (name == k->name) return *k;
    throw std::invalid_argument("no kernels named " + name + " run on this machine");
}

std::vector<std::string> names(const std::vector<const Kernels*>& kernels) {
    std::vector<std::string> out;
    for (const Kernels* k : kernels) out.push_back(k->name);
    return out;
}

// Python sets fields by name. An address of 0 is null.
template <typename Problem, typename Field>
auto address(Field Problem::*field) {
    return [field](Problem& problem, std::uintptr_t at) { problem.*field = reinterpret_cast<Field>(at); };
}

Pool pool(int workers, std::uintptr_t parallel_for) {
    return {workers, reinterpret_cast<fastalign::ParallelFor>(parallel_for)};
}

void accumulate_fisher(const Kernels& k, int dtype, std::uintptr_t fisher, std::int64_t fisher_stride,
                       std::uintptr_t grad_output, std::int64_t grad_stride, std::uintptr_t input,
                       std::int64_t input_stride, std::uintptr_t offsets, std::int64_t sequences, std::int64_t out,
                       std::int64_t in, int workers, std::uintptr_t parallel_for) {
    py::gil_scoped_release release;
    k.accumulate_fisher({static_cast<fastalign::DType>(dtype), reinterpret_cast<void*>(fisher), fisher_stride,
                         reinterpret_cast<const void*>(grad_output), grad_stride,
                         reinterpret_cast<const void*>(input), input_stride,
                         reinterpret_cast<const std::int64_t*>(offsets), sequences, out, in},
                        pool(workers, parallel_for));
}

// A tensor as (size, parameter, anchor, fisher, grad, fresh). The middle four are addresses.
using EwcFields =
    std::tuple<std::int64_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, std::uintptr_t, bool>;

double ewc_penalty(const Kernels& k, int dtype, int anchor_dtype, double strength, const std::vector<EwcFields>& tensors,
                   int workers, std::uintptr_t parallel_for) {
    py::gil_scoped_release release;
    fastalign::EwcProblem problem{static_cast<fastalign::DType>(dtype), static_cast<fastalign::DType>(anchor_dtype),
                                  strength, {}};
    for (const auto& [size, parameter, anchor, fisher, grad, fresh] : tensors)
        problem.tensors.push_back({size, reinterpret_cast<const void*>(parameter), reinterpret_cast<const void*>(anchor),
                                   reinterpret_cast<const void*>(fisher), reinterpret_cast<void*>(grad), fresh});
    return k.ewc_penalty(problem, pool(workers, parallel_for));
}

void rms_norm(const Kernels& k, int dtype, std::int64_t rows, std::int64_t width, double eps, std::uintptr_t x,
              std::uintptr_t weight, std::uintptr_t scale, std::uintptr_t grad, std::uintptr_t out, int workers,
              std::uintptr_t parallel_for) {
    py::gil_scoped_release release;
    k.rms_norm({static_cast<fastalign::DType>(dtype), rows, width, eps, reinterpret_cast<const void*>(x),
                reinterpret_cast<const void*>(weight), reinterpret_cast<void*>(scale),
                reinterpret_cast<const void*>(grad), reinterpret_cast<void*>(out)},
               pool(workers, parallel_for));
}

void gated(const Kernels& k, int dtype, std::int64_t size, std::uintptr_t gate, std::uintptr_t up, std::uintptr_t out,
           std::uintptr_t grad, std::uintptr_t d_gate, std::uintptr_t d_up, int workers, std::uintptr_t parallel_for) {
    py::gil_scoped_release release;
    k.gated({static_cast<fastalign::DType>(dtype), size, reinterpret_cast<const void*>(gate),
             reinterpret_cast<const void*>(up), reinterpret_cast<void*>(out), reinterpret_cast<const void*>(grad),
             reinterpret_cast<void*>(d_gate), reinterpret_cast<void*>(d_up)},
            pool(workers, parallel_for));
}

void bind_problems(py::module_& m) {
    using H = HeadProblem;
    py::class_<H>(m, "HeadProblem", py::module_local())
        .def_property("dtype", nullptr, [](H& p, int dtype) { p.dtype = static_cast<fastalign::DType>(dtype); })
        .def_property("hidden", nullptr, address(&H::hidden))
        .def_readwrite("hidden_stride", &H::hidden_stride)
        .def_property("weight", nullptr, address(&H::weight))
        .def_readwrite("weight_stride", &H::weight_stride)
        .def_property("bias", nullptr, address(&H::bias))
        .def_property("targets", nullptr, address(&H::targets))
        .def_readwrite("targets_per_token", &H::targets_per_token)
        .def_property("rows", nullptr, address(&H::rows))
        .def_readwrite("scored", &H::scored)
        .def_readwrite("vocab", &H::vocab)
        .def_readwrite("width", &H::width)
        .def_readwrite("logit_scale", &H::logit_scale)
        .def_readwrite("softcap", &H::softcap)
        .def_readwrite("temperature", &H::temperature)
        .def_property("cache", nullptr, address(&H::cache))
        .def_property("shifts", nullptr, address(&H::shifts))
        .def_readwrite("cache_rows", &H::cache_rows);
    using D = DivergenceProblem;
    py::class_<D>(m, "DivergenceProblem", py::module_local())
        .def(py::init([] { return D{}; }))
        .def_property("dtype", nullptr, [](D& p, int dtype) { p.dtype = static_cast<fastalign::DType>(dtype); })
        .def_property_readonly("student", [](D& p) { return &p.student; }, py::return_value_policy::reference_internal)
        .def_property_readonly("teacher", [](D& p) { return &p.teacher; }, py::return_value_policy::reference_internal)
        .def_property("kind", nullptr, [](D& p, int kind) { p.kind = static_cast<fastalign::Divergence>(kind); })
        .def_readwrite("beta", &D::beta)
        .def_readwrite("budget", &D::budget)
        .def_property("values", nullptr, address(&D::values))
        .def_property("grad_hidden", nullptr, address(&D::grad_hidden))
        .def_property("stats", nullptr, address(&D::stats))
        .def_property("coefficients", nullptr, address(&D::coefficients))
        .def_property("d_weight", nullptr, address(&D::d_weight))
        .def_property("d_bias", nullptr, address(&D::d_bias));
    using F = ForwardProblem;
    py::class_<F, H>(m, "ForwardProblem", py::module_local())
        .def(py::init([] { return F{}; }))
        .def_property("logprobs", nullptr, address(&F::logprobs))
        .def_property("entropy", nullptr, address(&F::entropy))
        .def_property("grad_logprobs", nullptr, address(&F::grad_logprobs))
        .def_property("grad_entropy", nullptr, address(&F::grad_entropy))
        .def_property("stats", nullptr, address(&F::stats))
        .def_property("details", nullptr, address(&F::details))
        .def_property("picked", nullptr, address(&F::picked));
    using B = BackwardProblem;
    py::class_<B, H>(m, "BackwardProblem", py::module_local())
        .def(py::init([] { return B{}; }))
        .def_property("grad_logprobs", nullptr, address(&B::grad_logprobs))
        .def_property("grad_entropy", nullptr, address(&B::grad_entropy))
        .def_property("stats", nullptr, address(&B::stats))
        .def_property("d_hidden", nullptr, address(&B::d_hidden))
        .def_property("d_weight", nullptr, address(&B::d_weight))
        .def_property("d_bias", nullptr, address(&B::d_bias))
        .def_property("grad_targets", nullptr, address(&B::grad_targets));
}

void bind_selective(py::module_& m) {
    using S = SelectiveProblem;
    py::class_<S>(m, "SelectiveProblem", py::module_local())
        .def(py::init([] { return S{}; }))
        .def_property("dtype", nullptr, [](S& p, int dtype) { p.dtype = static_cast<fastalign::DType>(dtype); })
        .def_property("logits", nullptr, address(&S::logits))
        .def_readwrite("inner", &S::inner)
        .def_readwrite("inner_stride", &S::inner_stride)
        .def_readwrite("outer_stride", &S::outer_stride)
        .def_property("targets", nullptr, address(&S::targets))
        .def_readwrite("rows", &S::rows)
        .def_readwrite("vocab", &S::vocab)
        .def_readwrite("ignore_index", &S::ignore_index)
        .def_readwrite("temperature", &S::temperature)
        .def_property("logprobs", nullptr, address(&S::logprobs))
        .def_property("stats", nullptr, address(&S::stats))
        .def_property("grad", nullptr, address(&S::grad))
        .def_property("d_logits", nullptr, address(&S::d_logits))
        .def_readwrite("cache_bytes", &S::cache_bytes);
}

void bind_attention(py::module_& m) {
    using A = AttentionProblem;
    auto heads = [](fastalign::Heads A::*field) {
        return [field](A& p, const std::tuple<std::uintptr_t, std::int64_t, std::int64_t>& of) {
            const auto& [at, head, token] = of;
            p.*field = {reinterpret_cast<const void*>(at), head, token};
        };
    };
    py::class_<A>(m, "AttentionProblem", py::module_local())
        .def(py::init([] { return A{}; }))
        .def_property("dtype", nullptr, [](A& p, int dtype) { p.dtype = static_cast<fastalign::DType>(dtype); })
        .def_readwrite("heads", &A::heads)
        .def_readwrite("key_heads", &A::key_heads)
        .def_readwrite("width", &A::width)
        .def_readwrite("value_width", &A::value_width)
        .def_property("query", nullptr, heads(&A::query))
        .def_property("key", nullptr, heads(&A::key))
        .def_property("value", nullptr, heads(&A::value))
        .def_property("grad", nullptr, heads(&A::grad))
        .def_property("segments", nullptr, address(&A::segments))
        .def_readwrite("count", &A::count)
        .def_readwrite("scaling", &A::scaling)
        .def_readwrite("window", &A::window)
        .def_property("out", nullptr, address(&A::out))
        .def_property("log_sums", nullptr, address(&A::log_sums))
        .def_property("d_query", nullptr, address(&A::d_query))
        .def_property("d_key", nullptr, address(&A::d_key))
        .def_property("d_value", nullptr, address(&A::d_value));
}

// Whether BRGEMM works with pairs on this machine. If not, libtorch throws.
bool multiplies_pairs(fastalign::Brgemm brgemm, fastalign::BrgemmRelease release) try {
    constexpr std::int64_t m = 16, n = 32, k = 4;
    std::uint16_t a[m * k], b[k * n];
    float c[m * n];
    const std::uint16_t small[] = {0x0000, 0x3f80, 0x4000, 0xbf80};  // 0, 1, 2, -1 in bfloat16
    const float values[] = {0, 1, 2, -1};
    for (std::int64_t i = 0; i < m * k; ++i) a[i] = small[i * 7 % 4];
    for (std::int64_t i = 0; i < k * n; ++i) b[i] = small[i * 5 / 3 % 4];  // (k / 2, n, 2)
    brgemm(m, n, k, k, n, n, false, a, b, c, true);
    if (release) release(true);
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            float sum = 0;
            for (std::int64_t t = 0; t < k; ++t)
                sum += values[(i * k + t) * 7 % 4] * values[((t / 2 * n + j) * 2 + t % 2) * 5 / 3 % 4];
            if (c[i * n + j] != sum) return false;
        }
    return true;
} catch (...) {
    return false;
}

void bind_kernels(py::module_& m) {
    py::class_<Kernels>(m, "Kernels", py::module_local())
        .def_readonly("name", &Kernels::name)
        .def_readonly("vector_bytes", &Kernels::vector_bytes)
        .def_readonly("panel_f32", &Kernels::panel_f32)
        .def_readonly("panel_f64", &Kernels::panel_f64)
        .def_readonly("tile", &Kernels::tile)
        .def("forward",
             [](const Kernels& k, const ForwardProblem& problem, int workers, std::uintptr_t parallel_for) {
                 py::gil_scoped_release release;
                 k.forward(problem, pool(workers, parallel_for));
             })
        .def("backward",
             [](const Kernels& k, const BackwardProblem& problem, int workers, std::uintptr_t parallel_for) {
                 py::gil_scoped_release release;
                 k.backward(problem, pool(workers, parallel_for));
             })
        .def("selective_forward",
             [](const Kernels& k, const SelectiveProblem& problem, int workers, std::uintptr_t parallel_for) {
                 py::gil_scoped_release release;
                 k.selective_forward(problem, pool(workers, parallel_for));
             })
        .def("selective_backward",
             [](const Kernels& k, const SelectiveProblem& problem, int workers, std::uintptr_t parallel_for) {
                 py::gil_scoped_release release;
                 k.selective_backward(problem, pool(workers, parallel_for));
             })
        .def("accumulate_fisher", &accumulate_fisher)
        .def("ewc_penalty", &ewc_penalty)
        .def("rms_norm", &rms_norm)
        .def("gated", &gated)
        .def("attention",
             [](const Kernels& k, const AttentionProblem& problem, int workers, std::uintptr_t parallel_for) {
                 py::gil_scoped_release release;
                 k.attention(problem, pool(workers, parallel_for));
             })
        .def("divergence",
             [](const Kernels& k, const DivergenceProblem& problem, int workers, std::uintptr_t parallel_for) {
                 py::gil_scoped_release release;
                 k.divergence(problem, pool(workers, parallel_for));
             })
        .def("exp_f32", [](const Kernels& k, std::uintptr_t in, std::uintptr_t out, std::int64_t n) {
            k.exp_f32(reinterpret_cast<const float*>(in), reinterpret_cast<float*>(out), n);
        });
    m.def("kernels", &kernels_named, py::return_value_policy::reference, py::arg("name"));
    m.def("available", [] { return names(fastalign::available_kernels()); });
    m.def("compiled", [] { return names(fastalign::compiled_kernels()); });
    m.def("set_brgemm", [](std::uintptr_t product, std::uintptr_t release) {
        const auto brgemm = reinterpret_cast<fastalign::Brgemm>(product);
        const auto done = reinterpret_cast<fastalign::BrgemmRelease>(release);
        if (!multiplies_pairs(brgemm, done)) return false;
        fastalign::brgemm_bf16 = brgemm, fastalign::brgemm_release = done;
        return true;
    });
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fastalign's C++ kernels for the CPU; called through fastalign.ops.";
    m.attr("compiler") = FASTALIGN_COMPILER;
    m.def("segment_sum_f32", &segment_sum<float>, py::arg("values"), py::arg("offsets"), py::arg("segments"),
          py::arg("out"));
    m.def("segment_sum_f64", &segment_sum<double>, py::arg("values"), py::arg("offsets"), py::arg("segments"),
          py::arg("out"));
    m.def("preference_loss_f32", &preference_loss<float>);
    m.def("preference_loss_f64", &preference_loss<double>);
    m.def("preference_loss_backward_f32", &preference_loss_backward<float>);
    m.def("preference_loss_backward_f64", &preference_loss_backward<double>);
    bind_problems(m);
    bind_selective(m);
    bind_attention(m);
    bind_kernels(m);
    m.def("use_huge_pages", [](bool yes) { fastalign::huge_pages = yes; });
    m.def("prefer_huge_pages", [](std::uintptr_t data, std::size_t bytes) {
        fastalign::prefer_huge_pages(reinterpret_cast<void*>(data), bytes);
    });
}
