// The epilogues of linear_divergence, on tiles of logits that are held: one block a row, student and teacher read
// together, all in place. What is computed, and why so, is told in fastalign/ops/head/divergence_terms.py.

#include "tile.h"

namespace fastalign::cuda {
namespace {

constexpr int kThreads = 512;  // two tiles in registers at once leave no room for more

// Products -> logits in place, folded into the running maximum and sum of exponentials of each row.
// budget: 64 registers, 128 bytes shared, 4 wide loads, 4 wide stores
__global__ void __launch_bounds__(kThreads, 2) normalise_kernel(Divergence p) {
    __shared__ float maxima[kThreads / 32], sums[kThreads / 32];
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns);
    float z[kItems];
    load_row(p.a + row * p.a_stride, columns, z, kNegativeInfinity);
    const Head head = p.head;
    to_logits(head, p.bias, columns, z);
    float top = kStart;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        if (column_of(i) < columns) z[i] = fmaxf(z[i], kStart);  // ruled out by the bias, yet finite
        top = fmaxf(top, z[i]);
    }
    store_row(p.a + row * p.a_stride, columns, z);
    const float before = p.top[row];
    top = fmaxf(before, block_reduced(top, kStart, maxima, Max{}));
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += __expf(z[i] - top);
    sum = block_reduced(sum, 0.0f, sums, Add{});
    if (threadIdx.x == 0) p.top[row] = top, p.total[row] = p.total[row] * __expf(before - top) + sum;
}

// What one entry adds to the value and to K, from log s and log t; they become what the gradient is made of.
__device__ __forceinline__ void terms_of(DivergenceKind kind, float beta, float& a, float& b, float& value, float& k) {
    // With d = log(t / s) / 2: t - s is (s + t) tanh d. d - tanh d comes from its series where it would cancel.
    const float both = __expf(a) + __expf(b), d = 0.5f * (b - a), tanh_d = tanhf(d), square = d * d;
    const float series = d * square * (1 / 3.0f + square * (-2 / 15.0f + square * (17 / 315.0f - square * (62 / 2835.0f))));
    const bool near = square < 0.0625f;
    if (kind == DivergenceKind::forward_kl) {
        value += both * (near ? d * tanh_d + series : d * (1 + tanh_d) - tanh_d);
        a = -both * tanh_d;  // s - t
        return;
    }
    const float s = __expf(a);
    if (kind == DivergenceKind::reverse_kl) {
        value += both * (near ? d * tanh_d - series : tanh_d - d * (1 - tanh_d));
        b = -2 * d * s;  // s log(s / t)
    } else {
        const float t = __expf(b), apart = both * tanh_d, x = apart / fmaxf(s + beta * apart, FLT_MIN);
        b = s * log1pf(fmaxf(-beta * x, FLT_EPSILON - 1));  // s log(s / m)
        value += beta * t * log1pf(fmaxf((1 - beta) * x, FLT_EPSILON - 1)) + (1 - beta) * b;
    }
    a = s;
    k += b;
}

// Values and K of each row, plus those of this tile; a and b are overwritten.
// budget: 96 registers, 128 bytes shared, 8 wide loads, 8 wide stores
__global__ void __launch_bounds__(kThreads, 1) terms_kernel(Divergence p) {
    __shared__ float values[kThreads / 32], moments[kThreads / 32];
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns);
    const float* stats = p.stats + row * p.stats_stride;
    float a[kItems], b[kItems], value = 0.0f, moment = 0.0f;
    load_row(p.a + row * p.a_stride, columns, a, kStart);
    load_row(p.b + row * p.b_stride, columns, b, kStart);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const float slope = p.head.outer != 0.0f ? capped_slope(p.head, fmaxf(a[i], -p.head.outer)) : 1.0f;
        a[i] = a[i] - stats[0] - stats[1], b[i] = b[i] - stats[2] - stats[3];
        terms_of(p.kind, p.beta, a[i], b[i], value, moment);
        a[i] *= slope, b[i] *= slope;
    }
    store_row(p.a + row * p.a_stride, columns, a);
    if (p.kind != DivergenceKind::forward_kl) store_row(p.b + row * p.b_stride, columns, b);
    value = block_reduced(value, 0.0f, values, Add{});
    moment = block_reduced(moment, 0.0f, moments, Add{});
    if (threadIdx.x == 0) {
        p.values[row] += value;
        if (p.kind != DivergenceKind::forward_kl) p.moments[row] += moment;
    }
}

// c = scale a, or scale (b - moment a), times coefficients: from what terms_kernel left, in the last product's dtype.
// budget: 64 registers, 0 bytes shared, 8 wide loads, 2 wide stores
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) divergence_gradient_kernel(Divergence p) {
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns);
    float c[kItems];
    load_row(p.a + row * p.a_stride, columns, c, 0.0f);
    if (p.b) {
        float b[kItems];
        load_row(p.b + row * p.b_stride, columns, b, 0.0f);
        const float moment = p.moments[row];
#pragma unroll
        for (int i = 0; i < kItems; ++i) c[i] = b[i] - moment * c[i];
    }
    const float scale = p.coefficients ? p.scale * p.coefficients[row] : p.scale;
#pragma unroll
    for (int i = 0; i < kItems; ++i) c[i] *= scale;
    __syncthreads();  // c may lie in the memory of a, at another width
    store_row(static_cast<T*>(p.c) + row * p.c_stride, columns, c);
}

}  // namespace

int divergence_normalise(const Divergence& p, Where where) {
    if (p.columns > kThreads * kItems) return cudaErrorInvalidValue;
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    return launch(where, normalise_kernel, dim3(p.rows), tile_threads(p.columns), p);
}

int divergence_terms(const Divergence& p, Where where) {
    if (p.columns > kThreads * kItems) return cudaErrorInvalidValue;
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    return launch(where, terms_kernel, dim3(p.rows), tile_threads(p.columns), p);
}

int divergence_gradient(const Divergence& p, Where where) {
    if (p.columns > kThreads * kItems) return cudaErrorInvalidValue;
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    return for_dtype(p.to, [&](auto zero) {
        return launch(where, divergence_gradient_kernel<decltype(zero)>, dim3(p.rows), tile_threads(p.columns), p);
    });
}

}  // namespace fastalign::cuda
