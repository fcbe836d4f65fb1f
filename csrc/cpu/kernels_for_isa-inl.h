// All kernels for one instruction set. Each kernels_<isa>.cpp defines FASTALIGN_ISA and FASTALIGN_VECTOR_BYTES, and
// includes this file once.

#include "cpu/kernels.h"
#ifdef FASTALIGN_BRGEMM
#include "cpu/tiles/tiles_brgemm-inl.h"
#endif
#include "cpu/kernels/attention-inl.h"
#include "cpu/kernels/body-inl.h"
#include "cpu/kernels/ewc-inl.h"
#include "cpu/kernels/fisher-inl.h"
#include "cpu/kernels/linear_divergence-inl.h"
#include "cpu/kernels/linear_logprobs_backward-inl.h"
#include "cpu/kernels/selective_logprobs-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

template <template <typename, typename> class Pass, typename Problem>
void run(const Problem& problem, const Pool& pool) {
    switch (problem.dtype) {
        case DType::f32: return Pass<float, float>(problem).run(pool);
        case DType::f64: return Pass<double, double>(problem).run(pool);
        case DType::bf16: return Pass<float, bf16>(problem).run(pool);
        case DType::f16: return Pass<float, f16>(problem).run(pool);
    }
}

inline double ewc_penalty(const EwcProblem& problem, const Pool& pool) {
    const bool wide = problem.anchor_dtype == DType::f32;
    switch (problem.dtype) {
        case DType::f32: return EwcPass<float, float, float>(problem).run(pool);
        case DType::f64: return EwcPass<double, double, double>(problem).run(pool);
        case DType::bf16:
            return wide ? EwcPass<float, bf16, float>(problem).run(pool) : EwcPass<float, bf16, bf16>(problem).run(pool);
        case DType::f16:
            return wide ? EwcPass<float, f16, float>(problem).run(pool) : EwcPass<float, f16, f16>(problem).run(pool);
    }
    return 0;
}

template <bool backward>
void run_selective(const SelectiveProblem& problem, const Pool& pool) {
    auto run = [&](auto pass) { backward ? pass.run_backward(pool) : pass.run_forward(pool); };
    switch (problem.dtype) {
        case DType::f32: return run(SelectivePass<float, float>{problem});
        case DType::f64: return run(SelectivePass<double, double>{problem});
        case DType::bf16: return run(SelectivePass<float, bf16>{problem});
        case DType::f16: return run(SelectivePass<float, f16>{problem});
    }
}

inline void exp_f32(const float* in, float* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = vexp(fill(in[i]))[0];
}

#define FASTALIGN_STRING_(x) #x
#define FASTALIGN_STRING(x) FASTALIGN_STRING_(x)

extern const Kernels kernels;
const Kernels kernels = {FASTALIGN_STRING(FASTALIGN_ISA), FASTALIGN_VECTOR_BYTES, Shape<float>::panel,
                         Shape<double>::panel, Shape<float>::tile, &run<ForwardPass, ForwardProblem>,
                         &run<BackwardPass, BackwardProblem>, &run_selective<false>, &run_selective<true>,
                         &run<DivergencePass, DivergenceProblem>,
                         &run<FisherPass, FisherProblem>, &ewc_penalty,
                         &run<RmsNormPass, RmsNormProblem>, &run<GatedPass, GatedProblem>,
                         &run<AttentionPass, AttentionProblem>, &exp_f32};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
