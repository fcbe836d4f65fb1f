// Turns the sums over the whole vocabulary into results, with one block per row: the log-prob, the entropy, what the
// backward pass needs, and the gradients, which overwrite the sums of the products. `finish` in
// fastalign/ops/head/epilogue.py is the definition.

#include "device.h"

namespace fastalign::cuda {
namespace {

constexpr int kFinishThreads = 128;

// budget: 40 registers, 0 bytes shared
template <typename W>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(Finish p) {
    const std::int64_t row = blockIdx.x;
    const float others = p.others[row], z_y = p.target[row], shifted = z_y - p.shift[row];
    const float at_target = expf(shifted), total = others + at_target, held = fmaxf(shifted, kStart);
    const float mean = p.zothers ? (p.zothers[row] + at_target * held) / total : 0.0f;
    const float capped = p.head.outer != 0.0f ? z_y / p.head.outer : 0.0f;
    const float t = fmaxf(capped, -1.0f), slope = p.head.factor * (1.0f - t * t);
    if (threadIdx.x == 0) {
        // log1p keeps the digits of a log-prob near 0. Far below the maximum the exponential would overflow.
        p.logprobs[row] =
            shifted > -30.0f ? -log1pf(others * expf(fminf(-shifted, 30.0f))) : shifted - logf(total);
        p.entropies[row] = p.zothers ? logf(total) - mean : 0.0f;
        p.at_target[row] = at_target, p.slope[row] = slope, p.mean[row] = mean;
    }
    if (!p.a) return;
    // Here a and b hold sum e_j m_j W[j] and sum e_j (z_j - shift) m_j W[j] without the target, m_j = dz_j / du_j, except
    // that a constant m_j is still missing. They become
    //   d log p(y) / d hidden = (1 - p_y) m_y W[y] - sum_{j != y} p_j m_j W[j]   with 1 - p_y = others / total
    //   d entropy / d hidden = -sum_j p_j (z_j - shift - mean) m_j W[j]
    const float scale = (p.head.outer != 0.0f ? 1.0f : p.head.factor) / total;
    const float of_a = others / total * slope, of_b = at_target * slope * (held - mean) / total;
    const W* w_y = static_cast<const W*>(p.weight) + p.targets[row] * p.weight_stride;
    float* a = p.a + row * p.a_stride;
    float* b = p.b ? p.b + row * p.b_stride : nullptr;
    for (std::int64_t i = threadIdx.x; i < p.width; i += kFinishThreads) {
        const float w = to_float(w_y[i]), mean_w = scale * a[i];
        if (b) b[i] = mean * mean_w - scale * b[i] - of_b * w;
        a[i] = of_a * w - mean_w;
    }
}

}  // namespace

int finish(const Finish& p, Where where) {
    if (p.rows == 0) return cudaSuccess;
    return for_dtype(p.dtype, [&](auto w) {
        return launch(where, finish_kernel<decltype(w)>, dim3(p.rows), kFinishThreads, p);
    });
}

}  // namespace fastalign::cuda
