#pragma once

// The three matrix products of a head, on tiles, around one register-tiled micro-kernel.
//
// Tokens are the vector lanes: a tile of logits is stored as panels [tile][panel], with one column per token. That has
// three advantages:
//
// - the softmax needs no reduction across the lanes of a vector
// - every product reads the rows of the tile in order
// - a token gets the same bits at any place in the batch
//
// Sums run in the order of the contracted index, whatever the blocking.

#include "cpu/base/simd-inl.h"

#ifndef FASTALIGN_VECTORS
#define FASTALIGN_VECTORS 3
#endif

namespace fastalign {
namespace FASTALIGN_ISA {

template <typename T>
struct Shape {
    static constexpr int vectors = FASTALIGN_VECTORS;          // vectors in a row of a register tile
    static constexpr std::int64_t panel = vectors * lanes<T>;  // tokens, or columns of the weight, in a panel
    // Rows of a register tile. height * vectors accumulators fill the 16 registers (32 with AVX-512).
    static constexpr int height = FASTALIGN_VECTOR_BYTES == 64 ? 8 : panel % 4 == 0 ? 4 : 3;
    static constexpr std::int64_t tile = 256;   // vocabulary entries of one tile
    // Terms summed at a time. A panel of that depth fits L1, and short sums have small rounding errors.
    static constexpr std::int64_t depth = 128;
    static_assert(panel % height == 0);
};

FASTALIGN_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
FASTALIGN_INLINE std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The left operand. Element (i, k) is at[i * row + k * step]. After every `run` values of k the address moves on by
// `jump` in addition (never if run is 0).
template <typename T>
struct Left {
    const T* at;
    std::int64_t row, step, run, jump;
};

// c (height, panel) = left (height, depth) times right (depth, panel) if `fresh`, else +=. The product is summed
// separately and added to c at the end, because the rounding error of a sum grows with the number of terms that were
// added one by one.
template <typename T, int height>
void micro_kernel(const Left<T> left, const T* right, std::int64_t depth, T* c, std::int64_t c_row, bool fresh) {
    constexpr int vectors = Shape<T>::vectors, L = lanes<T>;
    Vec<T> sum[height][vectors];
    for (int i = 0; i < height; ++i)
        for (int j = 0; j < vectors; ++j) sum[i][j] = Vec<T>{};
    const T* a = left.at;
    std::int64_t until_jump = left.run;
    for (std::int64_t k = 0; k < depth; ++k, right += vectors * L) {
        Vec<T> b[vectors];
        for (int j = 0; j < vectors; ++j) b[j] = load(right + j * L);
#pragma GCC unroll 8
        for (int i = 0; i < height; ++i)
            for (int j = 0; j < vectors; ++j) sum[i][j] += a[i * left.row] * b[j];
        a += left.step;
        if (--until_jump == 0) a += left.jump, until_jump = left.run;
    }
    for (int i = 0; i < height; ++i)
        for (int j = 0; j < vectors; ++j)
            store(c + i * c_row + j * L, fresh ? sum[i][j] : load(c + i * c_row + j * L) + sum[i][j]);
}

// The same for the last rows of a tile, if they are fewer than Shape::height.
template <typename T, int height = Shape<T>::height - 1>
void micro_kernel_rest(std::int64_t rows, const Left<T> left, const T* right, std::int64_t depth, T* c,
                       std::int64_t c_row, bool fresh) {
    if (rows == height) return micro_kernel<T, height>(left, right, depth, c, c_row, fresh);
    if constexpr (height > 1) micro_kernel_rest<T, height - 1>(rows, left, right, depth, c, c_row, fresh);
}

// z (panels, tile, panel) = weight tile (tile, width) times hidden panels (panels, width, panel).
// `scratch` (tile, depth) holds the widened weight if In is not T.
template <typename T, typename In>
void logits_product(const T* hidden, std::int64_t panels, std::int64_t width, const In* weight, std::int64_t stride,
                    std::int64_t tile, T* z, T* scratch) {
    using S = Shape<T>;
    const std::int64_t depth = ceil_div(width, ceil_div(width, S::depth));
    for (std::int64_t k0 = 0; k0 < width; k0 += depth) {
        const std::int64_t kn = smaller(depth, width - k0);
        const T* w;
        std::int64_t w_row;
        if constexpr (sizeof(In) == sizeof(T)) {
            w = weight + k0, w_row = stride;
        } else {
            for (std::int64_t t = 0; t < tile; ++t) widen_row(weight + t * stride + k0, scratch + t * depth, kn);
            w = scratch, w_row = depth;
        }
        for (std::int64_t p = 0; p < panels; ++p) {
            const T* h = hidden + (p * width + k0) * S::panel;
            T* out = z + p * S::tile * S::panel;
            std::int64_t t = 0;
            for (; t + S::height <= tile; t += S::height)
                micro_kernel<T, S::height>({w + t * w_row, w_row, 1, 0, 0}, h, kn, out + t * S::panel, S::panel, k0 == 0);
            micro_kernel_rest<T>(tile - t, {w + t * w_row, w_row, 1, 0, 0}, h, kn, out + t * S::panel, S::panel, k0 == 0);
        }
    }
}

// out (panels * panel, out_row) = z' (tokens, tile) times weight tile (tile, width) if `fresh`, else +=. It is the
// second product of an attention over the vocabulary. `column` (tile, panel) holds one packed strip of the weight.
template <typename T, typename In>
void fold_product(const T* z, std::int64_t panels, std::int64_t width, const In* weight, std::int64_t stride,
                  std::int64_t tile, T* out, std::int64_t out_row, T* column, bool fresh) {
    using S = Shape<T>;
    const std::int64_t kernels = panels * (S::panel / S::height), share = ceil_div(tile, kernels);
    for (std::int64_t j = 0; j < width; j += S::panel) {
        const std::int64_t columns = smaller(S::panel, width - j);
        for (std::int64_t t = 0; t < tile; ++t) {
            if (columns == S::panel) {
                widen_row(weight + t * stride + j, column + t * S::panel, S::panel);
            } else {
                for (std::int64_t x = columns; x < S::panel; ++x) column[t * S::panel + x] = 0;
                widen_row(weight + t * stride + j, column + t * S::panel, columns);
            }
        }
        std::int64_t ahead = 0;  // rows of the next strip prefetched so far; hardware does not prefetch such strides
        for (std::int64_t p = 0; p < panels; ++p) {
            for (std::int64_t i = 0; i < S::panel; i += S::height) {
                for (const std::int64_t stop = smaller(ahead + share, tile); ahead < stop; ++ahead)
                    if (j + S::panel < width) {
                        __builtin_prefetch(weight + ahead * stride + j + S::panel);
                        __builtin_prefetch(weight + ahead * stride + smaller(j + 2 * S::panel, width) - 1);
                    }
                micro_kernel<T, S::height>({z + p * S::tile * S::panel + i, 1, S::panel, 0, 0}, column, tile,
                                           out + (p * S::panel + i) * out_row + j, out_row, fresh);
            }
        }
    }
}

// out (tile, out_row) = z (tile, tokens) times hidden (tokens, width) if `fresh`, else +=. hidden is stored as strips
// (width / panel, tokens, panel).
template <typename T>
void outer_product(const T* z, std::int64_t panels, std::int64_t width, const T* strips, std::int64_t tile, T* out,
                   std::int64_t out_row, bool fresh) {
    using S = Shape<T>;
    const std::int64_t tokens = panels * S::panel, jump = (S::tile - 1) * S::panel;
    for (std::int64_t j = 0; j < width; j += S::panel, strips += tokens * S::panel) {
        std::int64_t t = 0;
        for (; t + S::height <= tile; t += S::height)
            micro_kernel<T, S::height>({z + t * S::panel, S::panel, 1, S::panel, jump}, strips, tokens,
                                       out + t * out_row + j, out_row, fresh);
        micro_kernel_rest<T>(tile - t, {z + t * S::panel, S::panel, 1, S::panel, jump}, strips, tokens,
                             out + t * out_row + j, out_row, fresh);
    }
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
