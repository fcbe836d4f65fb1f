// One row of a tile of logits in the registers of a block: 16 values per thread, in two runs of 8 neighbours. The whole
// row is read before any of it is written, so results may overwrite their inputs.
#pragma once

#include "device.h"

namespace fastalign::cuda {

constexpr int kRun = 8, kRuns = 2, kItems = kRun * kRuns;
constexpr int kTileThreads = 1024, kMaxColumns = kTileThreads * kItems;

inline unsigned tile_threads(std::int64_t columns) {
    return static_cast<unsigned>((columns + 32 * kItems - 1) / (32 * kItems) * 32);
}

template <typename T>
__device__ __forceinline__ bool aligned(const T* at) {
    return reinterpret_cast<std::uintptr_t>(at) % 16 == 0;
}

// The column of an item of this thread.
__device__ __forceinline__ int column_of(int item) {
    return (item / kRun * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kRun + item % kRun;
}

// The item of this thread that holds a column, or -1.
__device__ __forceinline__ int item_of(int column) {
    const unsigned first = column - column_of(0), second = column - column_of(kRun);
    return static_cast<int>(first < kRun ? first : second < kRun ? kRun + second : ~0u);
}

// load_row and store_row compare the index of an item with the number of columns left, instead of its column with the
// end of the row, because 16 columns would need 16 registers.
template <typename T>
__device__ __forceinline__ void load_row(const T* row, int columns, float (&values)[kItems], float beyond) {
    const bool vectors = aligned(row);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        const int first = column_of(run * kRun), left = columns - first;
        const T* at = row + first;
        if (vectors && left >= kRun) {
#pragma unroll
            for (int i = 0; i < kRun; i += kPack<T>) {
                float pack[kPack<T>];
                load_pack(at + i, pack);
#pragma unroll
                for (int j = 0; j < kPack<T>; ++j) values[run * kRun + i + j] = pack[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i) values[run * kRun + i] = i < left ? to_float(at[i]) : beyond;
        }
    }
}

template <typename T>
__device__ __forceinline__ void store_row(T* row, int columns, const float (&values)[kItems]) {
    const bool vectors = aligned(row);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
        const int first = column_of(run * kRun), left = columns - first;
        T* at = row + first;
        if (vectors && left >= kRun) {
#pragma unroll
            for (int i = 0; i < kRun; i += kPack<T>) {
                float pack[kPack<T>];
#pragma unroll
                for (int j = 0; j < kPack<T>; ++j) pack[j] = values[run * kRun + i + j];
                store_pack(at + i, pack);
            }
        } else {
#pragma unroll
            for (int i = 0; i < kRun; ++i)
                if (i < left) at[i] = from_float<T>(values[run * kRun + i]);
        }
    }
}

// Turns u into z in place. Columns beyond the tile are -inf before and after.
__device__ __forceinline__ void to_logits(const Head& head, const float* bias, int columns, float (&z)[kItems]) {
    if (bias) {
        float added[kItems];
        load_row(bias, columns, added, 0.0f);
#pragma unroll
        for (int i = 0; i < kItems; ++i) z[i] += added[i];
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const float capped = head.outer != 0.0f ? head.outer * tanhf(head.inner * z[i]) : head.factor * z[i];
        z[i] = column_of(i) < columns ? capped : kNegativeInfinity;
    }
}

// dz/du under a cap, at the logit z.
__device__ __forceinline__ float capped_slope(const Head& head, float z) {
    const float t = z / head.outer;
    return head.factor * (1.0f - t * t);
}

// The target's column in this tile, or -1.
__device__ __forceinline__ int target_column(const Tile& p, std::int64_t row) {
    const std::int64_t column = p.targets[row] - p.first;
    return column >= 0 && column < p.columns ? static_cast<int>(column) : -1;
}

}  // namespace fastalign::cuda
