// Elastic weight consolidation, and squared gradients, over many tensors at once. The addresses of the tensors are
// arguments of the launch. A block computes 4096 elements of one tensor, and each element is read once. Every block
// writes one sum. The sums are added afterwards, in an order that depends only on the shapes.

#include "ewc.h"

#include "tile.h"

namespace fastalign::cuda {
namespace {

constexpr int kHeldThreads = 256;
static_assert(kHeldThreads * kItems == kHeldBlock, "a thread holds kItems elements");

// Returns the tensor of this block, and sets `start` to the first element of the block in it.
__device__ __forceinline__ int tensor_of(const HeldBatch& p, std::int64_t& start) {
    int i = 0;
    while (i + 1 < p.count && p.tensors[i + 1].first_block <= static_cast<int>(blockIdx.x)) ++i;
    start = std::int64_t(static_cast<int>(blockIdx.x) - p.tensors[i].first_block) * kHeldBlock;
    return i;
}

__device__ __forceinline__ int length_of(const HeldTensor& t, std::int64_t start) {
    return static_cast<int>(t.size - start < kHeldBlock ? t.size - start : kHeldBlock);
}

// sums[b] = sum F (theta - anchor)^2 of block b. grad = strength F (theta - anchor) if it is fresh, else +=.
// Four blocks per multiprocessor allow a thread 64 registers. Without that number nvcc 13.0 aims at 48 for __half on
// sm_90 and spills two registers.
// budget: 64 registers, 64 bytes shared, 6 wide loads, 2 wide stores
template <typename T, typename A>
__global__ void __launch_bounds__(kHeldThreads, 4) penalty_kernel(const __grid_constant__ HeldBatch p) {
    __shared__ double sums[kHeldThreads / 32];
    std::int64_t start;
    const HeldTensor& t = p.tensors[tensor_of(p, start)];
    const int length = length_of(t, start);
    float distance[kItems], other[kItems];
    load_row(static_cast<const T*>(t.theta) + start, length, distance, 0.0f);
    load_row(static_cast<const A*>(t.anchor) + start, length, other, 0.0f);
#pragma unroll
    for (int i = 0; i < kItems; ++i) distance[i] -= other[i], other[i] = distance[i];
    if (t.fisher) {
        load_row(t.fisher + start, length, other, 0.0f);
#pragma unroll
        for (int i = 0; i < kItems; ++i) other[i] *= distance[i];
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += other[i] * distance[i], other[i] *= p.strength;
    if (t.grad) {
        T* grad = static_cast<T*>(t.grad) + start;
        if (!t.fresh) {
            load_row(grad, length, distance, 0.0f);
#pragma unroll
            for (int i = 0; i < kItems; ++i) other[i] += distance[i];
        }
        store_row(grad, length, other);
    }
    const double all = block_reduced(double(sum), 0.0, sums, Add{});
    if (threadIdx.x == 0) p.sums[blockIdx.x] = all;
}

template <typename Kernel>
int launch_batches(const std::vector<HeldTensor>& tensors, float strength, double* sums, Where where, Kernel kernel) {
    HeldBatch batch = {};
    batch.strength = strength, batch.sums = sums;
    std::int64_t blocks = 0;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
        if (tensors[i].size > 0) {
            batch.tensors[batch.count] = tensors[i];
            batch.tensors[batch.count++].first_block = static_cast<int>(blocks);
            blocks += held_blocks(tensors[i].size);
        }
        if (batch.count < kHeldTensors && i + 1 < tensors.size()) continue;
        if (batch.count == 0) continue;
        if (const int error = launch(where, kernel, dim3(blocks), kHeldThreads, batch)) return error;
        if (batch.sums) batch.sums += blocks;
        batch.count = 0, blocks = 0;
    }
    return cudaSuccess;
}

}  // namespace

int ewc_penalty(DType theta, DType anchor, float strength, const std::vector<HeldTensor>& tensors, double* sums,
                Where where) {
    if (anchor != theta && anchor != DType::f32) return cudaErrorInvalidValue;
    return for_dtype(theta, [&](auto t) {
        using T = decltype(t);
        if (anchor == DType::f32) return launch_batches(tensors, strength, sums, where, penalty_kernel<T, float>);
        return launch_batches(tensors, strength, sums, where, penalty_kernel<T, T>);
    });
}

}  // namespace fastalign::cuda
