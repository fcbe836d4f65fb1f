// The gradient of a tile of logits for a trainable head, with one block per row, one read and one write. The result may
// overwrite the tile. `softmax_gradient` and `kept_gradient` in fastalign/ops/head/epilogue.py are the definition.

#include "tile.h"

namespace fastalign::cuda {
namespace {

// budget: 64 registers, 0 bytes shared, 6 wide loads, 2 wide stores
template <typename U, typename D>
__global__ void __launch_bounds__(kTileThreads, 1) gradient_kernel(Gradient p) {
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns), target = target_column(p, row);
    float z[kItems];
    load_row(static_cast<const U*>(p.u) + row * p.u_stride, columns, z, kNegativeInfinity);
    to_logits(p.head, p.bias, columns, z);
    const float shift = p.shift[row], mean = p.mean[row], logprobs = p.logprobs[row], at_target = p.target[row];
    const float entropy = p.entropy ? p.entropy[row] : 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const float slope = p.head.outer != 0.0f ? capped_slope(p.head, z[i]) : p.head.factor, d = z[i] - shift;
        // logprobs and entropy are the incoming gradients over -total, so this is -g p_j, and the entropy's part.
        const float g = (logprobs + entropy * (fmaxf(d, kStart) - mean)) * __expf(d) * slope;
        z[i] = column_of(i) == target ? at_target : g;
    }
    __syncthreads();  // du may overwrite u, with elements of another size
    store_row(static_cast<D*>(p.du) + row * p.du_stride, columns, z);
}

// The same without cap, bias and entropy. Half the registers are enough, so twice as many warps hide the latency of the
// memory.
// budget: 32 registers, 0 bytes shared, 2 wide loads, 2 wide stores
template <typename U, typename D>
__global__ void __launch_bounds__(kTileThreads, 2) plain_gradient_kernel(Gradient p) {
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns);
    float z[kItems];
    load_row(static_cast<const U*>(p.u) + row * p.u_stride, columns, z, kNegativeInfinity);
    const int target = item_of(target_column(p, row));
    const float shift = p.shift[row], logprobs = p.logprobs[row], at_target = p.target[row], factor = p.head.factor;
#pragma unroll
    for (int i = 0; i < kItems; ++i)
        z[i] = i == target ? at_target : logprobs * __expf(factor * z[i] - shift) * factor;
    __syncthreads();  // as in gradient_kernel
    store_row(static_cast<D*>(p.du) + row * p.du_stride, columns, z);
}

// budget: 32 registers, 0 bytes shared, 2 wide loads, 2 wide stores
template <typename T>
__global__ void __launch_bounds__(kTileThreads, 2) kept_kernel(Gradient p) {
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns);
    float kept[kItems];
    load_row(static_cast<const T*>(p.u) + row * p.u_stride, columns, kept, 0.0f);
    const int target = item_of(target_column(p, row));
    const float scale = p.logprobs[row], at_target = p.target[row];
#pragma unroll
    for (int i = 0; i < kItems; ++i) kept[i] = i == target ? at_target : scale * kept[i];
    store_row(static_cast<T*>(p.du) + row * p.du_stride, columns, kept);
}

template <typename U, typename D>
int run(const Gradient& p, Where where) {
    const bool plain = p.head.outer == 0.0f && !p.bias && !p.entropy;
    return launch(where, plain ? plain_gradient_kernel<U, D> : gradient_kernel<U, D>, dim3(p.rows),
                  tile_threads(p.columns), p);
}

}  // namespace

int softmax_gradient(const Gradient& p, Where where) {
    if (p.columns > kMaxColumns) return cudaErrorInvalidValue;
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    if (p.from == DType::f32)
        return for_dtype(p.to, [&](auto d) { return run<float, decltype(d)>(p, where); });
    if (p.from != p.to) return cudaErrorInvalidValue;
    return p.to == DType::bf16 ? run<bf16, bf16>(p, where) : run<fp16, fp16>(p, where);
}

int kept_gradient(const Gradient& p, Where where) {
    if (p.columns > kMaxColumns || p.from != p.to) return cudaErrorInvalidValue;
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    return for_dtype(p.to, [&](auto zero) {
        return launch(where, kept_kernel<decltype(zero)>, dim3(p.rows), tile_threads(p.columns), p);
    });
}

}  // namespace fastalign::cuda
