// The online-softmax epilogue of a tile of logits, with one block per row and one read of the tile. It adds the row to
// its running sums, and leaves unnormalised probabilities for the second product. `absorb` in
// fastalign/ops/head/epilogue.py is the definition.

#include "tile.h"

namespace fastalign::cuda {
namespace {

// The shift may lag this far behind the maximum, so that a and b are hardly ever rescaled. exp(8) is 2981, which every
// dtype can represent.
constexpr float kLag = 8.0f;

// Rescales the accumulated products of a row to a new shift: a = sum e W and b = sum e (z - shift) W, where
// e = exp(z - shift). With moved = old shift - new shift and down = exp(moved), every e becomes down e, and z - shift
// grows by moved: b = down (b + moved a), a = down a.
__device__ __forceinline__ void rescale(const Absorb& p, std::int64_t row, float moved, float down) {
    float* a = p.a + row * p.a_stride;
    float* b = p.b ? p.b + row * p.b_stride : nullptr;
    const int width = static_cast<int>(p.width), vectors = aligned(a) && aligned(b) ? width / 4 : 0;
#pragma unroll 1
    for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
        float x[4];
        load_pack(a + 4 * i, x);
        if (b) {
            float y[4];
            load_pack(b + 4 * i, y);
#pragma unroll
            for (int j = 0; j < 4; ++j) y[j] = down * (y[j] + moved * x[j]);
            store_pack(b + 4 * i, y);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] *= down;
        store_pack(a + 4 * i, x);
    }
#pragma unroll 1
    for (int i = 4 * vectors + threadIdx.x; i < width; i += blockDim.x) {
        if (b) b[i] = down * (b[i] + moved * a[i]);
        a[i] *= down;
    }
}

// budget: 64 registers, 512 bytes shared, 8 wide loads, 6 wide stores
template <typename U, typename E>
__global__ void __launch_bounds__(kTileThreads, 1) absorb_kernel(Absorb p) {
    __shared__ float maxima[kTileThreads / 32], sums[kTileThreads / 32], zsums[kTileThreads / 32];
    __shared__ int firsts[kTileThreads / 32];
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns), target = target_column(p, row);
    float z[kItems];
    load_row(static_cast<const U*>(p.u) + row * p.u_stride, columns, z, kNegativeInfinity);
    to_logits(p.head, p.bias, columns, z);
    const float before = p.shift[row];
    float top = kNegativeInfinity;
#pragma unroll
    for (int i = 0; i < kItems; ++i) top = fmaxf(top, z[i]);
    // The barrier in it separates every read of this row from every write.
    top = block_reduced(top, kNegativeInfinity, maxima, Max{});
    const float shift = top > before + kLag ? top : before;

    float sum = 0.0f, zsum = 0.0f, target_logit = 0.0f;
    bool has_target = false;
    int best = INT32_MAX;
    float ze[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const int column = column_of(i);
        const float slope = p.head.outer != 0.0f ? capped_slope(p.head, z[i]) : 1.0f, d = z[i] - shift;
        if (z[i] == top && column < best && column < columns) best = column;
        if (column == target) has_target = true, target_logit = z[i];
        const float e = column == target ? 0.0f : __expf(d);
        sum += e;
        ze[i] = fmaxf(d, kStart) * e;  // -inf * 0 would be NaN
        zsum += ze[i];
        ze[i] *= slope, z[i] = column < columns ? e * slope : 0.0f;
    }
    if (has_target) p.target[row] = target_logit;
    if (p.e) store_row(static_cast<E*>(p.e) + row * p.e_stride, columns, z);
    if (p.ze) store_row(static_cast<E*>(p.ze) + row * p.ze_stride, columns, ze);

    sum = block_reduced(sum, 0.0f, sums, Add{});
    if (p.zothers) zsum = block_reduced(zsum, 0.0f, zsums, Add{});
    if (p.best) best = block_reduced(best, INT32_MAX, firsts, Min{});
    const float moved = before - shift, down = __expf(moved);
    if (threadIdx.x == 0) {
        const float others = p.others[row];
        p.shift[row] = shift;
        p.others[row] = down * others + sum;
        if (p.zothers) p.zothers[row] = down * (p.zothers[row] + moved * others) + zsum;
        if (p.best && top > p.best[row]) p.best[row] = top, p.best_index[row] = p.first + best;
    }
    if (p.a && shift != before && before > kStart) rescale(p, row, moved, down);
}

// The same without cap, bias, entropy and best, which most tiles do not need. Half the registers are enough, so twice
// as many warps hide the latency of the memory.
// budget: 32 registers, 256 bytes shared, 4 wide loads, 4 wide stores
template <typename U, typename E>
__global__ void __launch_bounds__(kTileThreads, 2) plain_absorb_kernel(Absorb p) {
    __shared__ float maxima[kTileThreads / 32], sums[kTileThreads / 32];
    const std::int64_t row = blockIdx.x;
    const int columns = static_cast<int>(p.columns);
    float z[kItems], top = kNegativeInfinity, sum = 0.0f;
    load_row(static_cast<const U*>(p.u) + row * p.u_stride, columns, z, kNegativeInfinity);
    const float before = p.shift[row];
    const int target = item_of(target_column(p, row));
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] *= p.head.factor;  // factor > 0: beyond the tile it stays -inf
    if (target >= 0) {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
            if (i == target) top = z[i], z[i] = kNegativeInfinity;  // leaves the target out of the sums
        p.target[row] = top;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) top = fmaxf(top, z[i]);
    // The barrier in it separates every read of this row from every write.
    top = block_reduced(top, kNegativeInfinity, maxima, Max{});
    const float shift = top > before + kLag ? top : before;
#pragma unroll
    for (int i = 0; i < kItems; ++i) z[i] = __expf(z[i] - shift), sum += z[i];
    sum = block_reduced(sum, 0.0f, sums, Add{});
    if (p.e) store_row(static_cast<E*>(p.e) + row * p.e_stride, columns, z);
    const float moved = before - shift, down = __expf(moved);
    if (threadIdx.x == 0) p.shift[row] = shift, p.others[row] = down * p.others[row] + sum;
    if (p.a && shift != before && before > kStart) rescale(p, row, moved, down);
}

template <typename U, typename E>
int run(const Absorb& p, Where where) {
    const bool plain = p.head.outer == 0.0f && p.head.factor > 0.0f && !p.bias && !p.zothers && !p.ze && !p.best;
    return launch(where, plain ? plain_absorb_kernel<U, E> : absorb_kernel<U, E>, dim3(p.rows),
                  tile_threads(p.columns), p);
}

}  // namespace

int absorb(const Absorb& p, Where where) {
    if (p.columns > kMaxColumns) return cudaErrorInvalidValue;
    if (p.rows == 0 || p.columns == 0) return cudaSuccess;
    if (p.from == DType::f32)
        return for_dtype(p.to, [&](auto e) { return run<float, decltype(e)>(p, where); });
    if (p.from != p.to) return cudaErrorInvalidValue;
    return p.to == DType::bf16 ? run<bf16, bf16>(p, where) : run<fp16, fp16>(p, where);
}

}  // namespace fastalign::cuda
