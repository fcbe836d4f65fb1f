// F += sum_s (G_s' X_s)^2. Tensor cores compute the product of a sequence, which is squared in registers. A block holds
// one tile of F in registers over all sequences, so F is read and written once. The operands pass through shared
// memory. While one chunk of tokens is multiplied, the next one is already being loaded into registers.
//
// bfloat16 and float16 are multiplied as they are. A float32 number is split into two TF32 numbers. Of the four
// products of their parts three are computed, because the fourth is only 2^-22 of the result.

#include "device.h"

#ifndef FASTALIGN_EMULATE_CUDA
#include <mma.h>
#endif

namespace fastalign::cuda {
namespace {

namespace wmma = nvcuda::wmma;

constexpr int kFisherThreads = 256;
constexpr int kTileRows = 128, kTileColumns = 64;  // of a tile of F
constexpr int kPatch = 16, kAcross = 2;            // a warp holds kAcross x kAcross patches of 16 x 16

template <typename T>
struct Product {
    static constexpr int kTokens = 16;  // tokens per tensor-core product
    using Element = T;
};
template <>
struct Product<float> {
    static constexpr int kTokens = 8;
    using Element = wmma::precision::tf32;
};
// A chunk has the tokens of two products. Rows in shared memory are 16 bytes longer than needed, which avoids bank
// conflicts.
template <typename T> constexpr int kChunk = 2 * Product<T>::kTokens;
template <typename T> constexpr int kGradPitch = kTileRows + kPack<T>;
template <typename T> constexpr int kInputPitch = kTileColumns + kPack<T>;

template <typename T> using Left = wmma::fragment<wmma::matrix_a, kPatch, kPatch, Product<T>::kTokens, typename Product<T>::Element, wmma::col_major>;
template <typename T> using Right = wmma::fragment<wmma::matrix_b, kPatch, kPatch, Product<T>::kTokens, typename Product<T>::Element, wmma::row_major>;
template <typename T> using Sum = wmma::fragment<wmma::accumulator, kPatch, kPatch, Product<T>::kTokens, float>;

// The tokens that are multiplied at a time: [begin, end) of a sequence. `last` says that the sequence ends with them.
struct Chunk {
    std::int64_t sequence, begin, end;
    bool last;
};

// Moves on to the next chunk: of the same sequence, or of the next sequence that has tokens. False if there is none.
template <typename T>
__device__ __forceinline__ bool next_chunk(const Fisher& p, Chunk& chunk, bool first) {
    std::int64_t begin = chunk.end;
    if (first || chunk.last) {
        chunk.sequence = first ? 0 : chunk.sequence + 1;
        for (;; ++chunk.sequence) {
            if (chunk.sequence >= p.sequences) return false;
            begin = p.offsets[chunk.sequence];
            if (begin >= 0 && begin < p.offsets[chunk.sequence + 1]) break;
        }
    }
    const std::int64_t offset = p.offsets[chunk.sequence + 1], end = offset < p.tokens ? offset : p.tokens;
    chunk.begin = begin;
    chunk.last = begin + kChunk<T> >= end;
    chunk.end = chunk.last ? end : begin + kChunk<T>;
    return true;
}

// Loads 16 bytes of a row of an operand, with zeros beyond the last token or column.
template <typename T>
__device__ __forceinline__ uint4 fetch(const T* matrix, std::int64_t stride, std::int64_t token, std::int64_t end,
                                       std::int64_t column, std::int64_t columns, bool vectors) {
    union { uint4 bits; T items[kPack<T>]; } pack;
    pack.bits = make_uint4(0, 0, 0, 0);
    if (token < end) {
        const T* at = matrix + token * stride + column;
        if (vectors && column + kPack<T> <= columns) return *reinterpret_cast<const uint4*>(at);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i)
            if (column + i < columns) pack.items[i] = at[i];
    }
    return pack.bits;
}

// A chunk of both operands in registers, between global and shared memory.
template <typename T>
struct InFlight {
    static constexpr int kGradPacks = kChunk<T> * kTileRows / kPack<T> / kFisherThreads;
    static constexpr int kInputPacks = kChunk<T> * kTileColumns / kPack<T> / kFisherThreads;
    static_assert(kInputPacks * kPack<T> * kFisherThreads == kChunk<T> * kTileColumns, "each thread moves whole packs");
    uint4 grad[kGradPacks], input[kInputPacks];

    __device__ __forceinline__ void load(const Fisher& p, const Chunk& chunk) {
        const T* g = static_cast<const T*>(p.grad_output);
        const T* x = static_cast<const T*>(p.input);
        constexpr int kGradRow = kTileRows / kPack<T>, kInputRow = kTileColumns / kPack<T>;
#pragma unroll
        for (int i = 0; i < kGradPacks; ++i) {
            const int pack = i * kFisherThreads + threadIdx.x;
            grad[i] = fetch(g, p.grad_stride, chunk.begin + pack / kGradRow, chunk.end,
                            std::int64_t(blockIdx.y) * kTileRows + pack % kGradRow * kPack<T>, p.out, p.grad_vectors);
        }
#pragma unroll
        for (int i = 0; i < kInputPacks; ++i) {
            const int pack = i * kFisherThreads + threadIdx.x;
            input[i] = fetch(x, p.input_stride, chunk.begin + pack / kInputRow, chunk.end,
                             std::int64_t(blockIdx.x) * kTileColumns + pack % kInputRow * kPack<T>, p.in,
                             p.input_vectors);
        }
    }
    __device__ __forceinline__ void store(T* grads, T* inputs) const {
        constexpr int kGradRow = kTileRows / kPack<T>, kInputRow = kTileColumns / kPack<T>;
#pragma unroll
        for (int i = 0; i < kGradPacks; ++i) {
            const int pack = i * kFisherThreads + threadIdx.x;
            *reinterpret_cast<uint4*>(grads + pack / kGradRow * kGradPitch<T> + pack % kGradRow * kPack<T>) = grad[i];
        }
#pragma unroll
        for (int i = 0; i < kInputPacks; ++i) {
            const int pack = i * kFisherThreads + threadIdx.x;
            *reinterpret_cast<uint4*>(inputs + pack / kInputRow * kInputPitch<T> + pack % kInputRow * kPack<T>) = input[i];
        }
    }
};

// Splits x into big + small, both TF32.
template <typename Fragment>
__device__ __forceinline__ void split(Fragment& big, Fragment& small) {
#pragma unroll
    for (int i = 0; i < big.num_elements; ++i) {
        const float x = big.x[i];
        big.x[i] = wmma::__float_to_tf32(x);
        small.x[i] = wmma::__float_to_tf32(x - big.x[i]);
    }
}

// sums += grads' inputs over the chunk in shared memory. The patches of this warp begin at (row, column).
template <typename T>
__device__ __forceinline__ void multiply(const T* grads, const T* inputs, int row, int column,
                                         Sum<T> (&sums)[kAcross][kAcross]) {
#pragma unroll
    for (int token = 0; token < kChunk<T>; token += Product<T>::kTokens) {
        Left<T> left[kAcross], left_small[kAcross];
        Right<T> right[kAcross], right_small[kAcross];
#pragma unroll
        for (int i = 0; i < kAcross; ++i) {
            wmma::load_matrix_sync(left[i], grads + token * kGradPitch<T> + row + i * kPatch, kGradPitch<T>);
            wmma::load_matrix_sync(right[i], inputs + token * kInputPitch<T> + column + i * kPatch, kInputPitch<T>);
            if constexpr (sizeof(T) == 4) split(left[i], left_small[i]), split(right[i], right_small[i]);
        }
#pragma unroll
        for (int i = 0; i < kAcross; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
                if constexpr (sizeof(T) == 4) {
                    wmma::mma_sync(sums[i][j], left_small[i], right[j], sums[i][j]);
                    wmma::mma_sync(sums[i][j], left[i], right_small[j], sums[i][j]);
                }
                wmma::mma_sync(sums[i][j], left[i], right[j], sums[i][j]);
            }
    }
}

// F += a patch of 16 x 16. One warp does this, through a part of shared memory that no other warp uses.
template <typename Fragment>
__device__ __forceinline__ void add_patch(const Fisher& p, std::int64_t row, std::int64_t column,
                                          const Fragment& total, float* piece) {
    wmma::store_matrix_sync(piece, total, kPatch, wmma::mem_row_major);
    __syncwarp();
    for (int pack = threadIdx.x % 32; pack < kPatch * kPatch / 4; pack += 32) {
        const std::int64_t i = row + pack / 4, j = column + pack % 4 * 4;
        if (i >= p.out || j >= p.in) continue;
        float* at = p.fisher + i * p.fisher_stride + j;
        if (p.fisher_vectors && j + 4 <= p.in) {
            float sums[4], more[4];
            load_pack(at, sums), load_pack(piece + 4 * pack, more);
            for (int k = 0; k < 4; ++k) sums[k] += more[k];
            store_pack(at, sums);
        } else {
            for (int k = 0; k < 4 && j + k < p.in; ++k) at[k] += piece[4 * pack + k];
        }
    }
    __syncwarp();
}

// budget: 168 registers, 13824 bytes shared, 4 wide loads, 1 wide stores, tensor cores
template <typename T>
__global__ void __launch_bounds__(kFisherThreads) fisher_kernel(Fisher p) {
    alignas(32) __shared__ T grads[kChunk<T> * kGradPitch<T>];
    alignas(32) __shared__ T inputs[kChunk<T> * kInputPitch<T>];
    const int warp = threadIdx.x / 32, patch_rows = kAcross * kPatch;
    const int row = warp % (kTileRows / patch_rows) * patch_rows, column = warp / (kTileRows / patch_rows) * patch_rows;
    Sum<T> sums[kAcross][kAcross], totals[kAcross][kAcross];
#pragma unroll
    for (int i = 0; i < kAcross; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j) wmma::fill_fragment(sums[i][j], 0.0f), wmma::fill_fragment(totals[i][j], 0.0f);

    Chunk chunk = {};
    InFlight<T> ahead;
    bool more = next_chunk<T>(p, chunk, true);
    if (more) ahead.load(p, chunk);
    while (more) {
        const bool last = chunk.last;
        ahead.store(grads, inputs);
        __syncthreads();
        more = next_chunk<T>(p, chunk, false);
        if (more) ahead.load(p, chunk);
        multiply<T>(grads, inputs, row, column, sums);
        __syncthreads();  // the next chunk will overwrite this one
        if (!last) continue;
#pragma unroll
        for (int i = 0; i < kAcross; ++i)
#pragma unroll
            for (int j = 0; j < kAcross; ++j) {
#pragma unroll
                for (int k = 0; k < sums[i][j].num_elements; ++k) totals[i][j].x[k] += sums[i][j].x[k] * sums[i][j].x[k];
                wmma::fill_fragment(sums[i][j], 0.0f);
            }
    }
    float* piece = reinterpret_cast<float*>(grads) + warp * kPatch * kPatch;
    static_assert(sizeof(grads) >= kFisherThreads / 32 * kPatch * kPatch * 4, "a piece for each warp");
#pragma unroll
    for (int i = 0; i < kAcross; ++i)
#pragma unroll
        for (int j = 0; j < kAcross; ++j)
            add_patch(p, std::int64_t(blockIdx.y) * kTileRows + row + i * kPatch,
                      std::int64_t(blockIdx.x) * kTileColumns + column + j * kPatch, totals[i][j], piece);
}

bool vectors(const void* matrix, std::int64_t stride, std::size_t element) {
    return reinterpret_cast<std::uintptr_t>(matrix) % 16 == 0 && stride * element % 16 == 0;
}

}  // namespace

int accumulate_fisher(Fisher p, Where where) {
    if (p.out == 0 || p.in == 0 || p.sequences == 0) return cudaSuccess;
    const std::size_t element = p.dtype == DType::f32 ? 4 : 2;
    p.grad_vectors = vectors(p.grad_output, p.grad_stride, element);
    p.input_vectors = vectors(p.input, p.input_stride, element);
    p.fisher_vectors = vectors(p.fisher, p.fisher_stride, 4);
    const dim3 grid((p.in + kTileColumns - 1) / kTileColumns, (p.out + kTileRows - 1) / kTileRows);
    return for_dtype(p.dtype, [&](auto zero) {
        return launch(where, fisher_kernel<decltype(zero)>, grid, kFisherThreads, p);
    });
}

}  // namespace fastalign::cuda
