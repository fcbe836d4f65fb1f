#pragma once

// The tiles of tiles-inl.h for bfloat16, on machines with matrix units for it. The products are libtorch's BRGEMM.
// csrc/check/check.cpp also tests this file with a plain loop in place of BRGEMM.
//
// - The operands of BRGEMM are packed by loops that the compiler can vectorise. They must be fast: a block has about
//   200 tokens, which leaves about a nanosecond per entry of the weight.
// - The tile of probabilities is rounded to bfloat16 before it enters a product, as is usual on such units.
// - libtorch compiles a kernel for each new shape and never frees it. So only a few different row counts are used, and
//   contractions have a multiple of 32 terms, with zeros after the last one.
// - The last panel of a block is rarely full. Products therefore end at a multiple of 16 tokens, or of 32 if the tokens
//   are contracted.

#include <algorithm>
#include <limits>

#include "cpu/tiles/brgemm.h"
#include "cpu/tiles/tiles-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

template <>
class Tiles<float, bf16> {
    using S = Shape<float>;
    static constexpr std::int64_t deep = 512, wide = 64;  // terms, and columns of the output, of one product
    static constexpr std::int64_t step = 32;
    static_assert(S::tile % step == 0 && step % 8 == 0 && wide % S::panel == 0);
    static constexpr std::int64_t few = 16;     // the tokens of a product are a multiple of this
    static constexpr std::int64_t fewest = 32;  // columns, because libtorch's kernel is slower with 16 than with 64
    bf16 *hidden_, *strips_, *pairs_, *left_, *panel_;
    std::int64_t count_ = std::numeric_limits<std::int64_t>::max() / 2;  // of tokens; set by `take_count`

    std::int64_t cut(std::int64_t panels, std::int64_t multiple) const {
        return smaller(panels * S::panel, ceil_div(count_, multiple) * multiple);
    }

    std::int64_t even_width() const { return (width + 1) / 2 * 2; }
    std::int64_t whole_blocks() const { return strips_size(1, width); }

public:
    std::int64_t width, padded_width;

    Tiles(Carver& c, std::int64_t rows, std::int64_t width, TileProducts needs)
        : width(width), padded_width(ceil_div(width, S::panel) * S::panel) {
        hidden_ = c.take<bf16>(needs.logits ? rows * (width + 1) : 0);
        strips_ = c.take<bf16>(needs.outer && !needs.shared ? strips_size(rows, width) : 0);
        pairs_ = c.take<bf16>(needs.fold || width % 2 ? S::tile * (whole_blocks() + 1) : 0);
        left_ = c.take<bf16>(needs.fold || needs.outer ? rows * S::tile : 0);
        panel_ = c.take<bf16>(needs.fold ? S::panel * S::tile : 0);
    }

    using Strip = bf16;
    static std::int64_t strips_size(std::int64_t rows, std::int64_t width) { return rows * ceil_div(width, wide) * wide; }
    void use_strips(Strip* strips) { strips_ = strips; }
    void take_count(std::int64_t count) { count_ = count; }

    // Packs the rows as (panels, width / 2, panel, 2).
    void take_rows(const RowBlock<bf16>& block) {
        const std::int64_t even = even_width();
        for (std::int64_t i = 0; i < ceil_div(block.count, S::panel) * S::panel; ++i) {
            bf16* to = hidden_ + i / S::panel * even * S::panel + i % S::panel * 2;
            const bf16* from = i < block.count ? block.hidden(i) : nullptr;
            for (std::int64_t k = 0; k < even; k += 2, to += S::panel * 2) {
                to[0] = from ? from[k] : bf16{0};
                to[1] = from && k + 1 < width ? from[k + 1] : bf16{0};
            }
        }
    }
    // Packs the rows as (blocks of columns, padded rows / 2, wide, 2).
    void take_rows_for_outer(const RowBlock<bf16>& block) {
        const std::int64_t rows = cut(ceil_div(block.count, S::panel), step);
        for (std::int64_t i = 0; i < rows; i += 2)
            pair(i < block.count ? block.hidden(i) : nullptr, i + 1 < block.count ? block.hidden(i + 1) : nullptr, i,
                 rows, strips_);
    }

    void logits(const WeightTile<bf16>& weight, std::int64_t first, std::int64_t last, float* z) {
        const std::int64_t even = even_width();
        const bf16* left = weight.at;
        std::int64_t row = weight.stride;
        if (width % 2) {  // the last pair would reach into the next row: copy the rows, with a zero at the end
            for (std::int64_t t = 0; t < weight.size; ++t)
                for (std::int64_t k = 0; k < even; ++k)
                    pairs_[t * even + k] = k < width ? weight.at[t * weight.stride + k] : bf16{0};
            left = pairs_, row = even;
        }
        for (std::int64_t p = first; p < last; ++p) {
            const std::int64_t tokens = smaller(S::panel, std::max(fewest, cut(last, few) - p * S::panel));
            for (std::int64_t k = 0; k < even; k += deep)
                by_rows(weight.size, [&](std::int64_t t, std::int64_t rows) {
                    brgemm_bf16(rows, tokens, smaller(deep, even - k), row, S::panel, S::panel, k > 0,
                                left + t * row + k, hidden_ + (p * even + k) * S::panel,
                                z + (p * S::tile + t) * S::panel, true);
                });
            for (std::int64_t t = 0; tokens < S::panel && t < weight.size; ++t)
                std::fill_n(z + (p * S::tile + t) * S::panel + tokens, S::panel - tokens, 0.0f);
        }
    }

    void fold(const float* z, std::int64_t panels, const WeightTile<bf16>& weight, float* out, bool fresh,
              bool again = false) {
        const std::int64_t contracted = ceil_div(weight.size, step) * step;
        auto row = [&](std::int64_t t) { return t < weight.size ? weight.at + t * weight.stride : nullptr; };
        again = again && width % 2 == 0;  // with an odd width `logits` overwrites pairs_
        for (std::int64_t t = 0; !again && t < contracted; t += 2) pair(row(t), row(t + 1), t, contracted, pairs_);
        for (std::int64_t p = 0; p < panels; ++p)
            transpose(z + p * S::tile * S::panel, weight.size, left_ + p * S::panel * S::tile);
        for (std::int64_t j = 0; j < padded_width; j += wide)
            brgemm_bf16(cut(panels, few), smaller(wide, padded_width - j), contracted, S::tile, wide, padded_width,
                        !fresh, left_, pairs_ + j * contracted, out + j, true);
    }

    void outer(const float* z, std::int64_t panels, std::int64_t tile, float* out, bool fresh = false) {
        const std::int64_t rows = cut(panels, step);  // one contraction over all panels, so the output is read once
        for (std::int64_t p = 0; p < panels; ++p)
            for (std::int64_t t = 0; t < tile; ++t)
                narrow_row(z + (p * S::tile + t) * S::panel, left_ + t * rows + p * S::panel,
                           smaller(S::panel, rows - p * S::panel));
        for (std::int64_t j = 0; j < padded_width; j += wide)
            by_rows(tile, [&](std::int64_t t, std::int64_t some) {
                brgemm_bf16(some, smaller(wide, padded_width - j), rows, rows, wide, padded_width, !fresh,
                            left_ + t * rows, strips_ + j * rows, out + t * padded_width + j, true);
            });
    }

    void release() {
        if (brgemm_release) brgemm_release(true);
    }

private:
    // Calls f(first row, number of rows) for parts of the rows. Their sizes are multiples of `step`, then powers of
    // two.
    template <typename F>
    static void by_rows(std::int64_t rows, const F& f) {
        for (std::int64_t at = 0, some; at < rows; at += some) {
            some = (rows - at) / step * step;
            for (std::int64_t less = step / 2; some == 0; less /= 2)
                if (less <= rows - at) some = less;
            f(at, some);
        }
    }

    // Writes rows `at` and `at + 1` of the right operand of a product, (blocks of columns, rows / 2, wide, 2), with
    // zeros beyond the width. A null row is all zeros. The layout is in blocks of columns because whole rows would
    // often be a power of two apart, and would evict each other from L1. A pair is written as one number because
    // compilers do not vectorise two separate stores.
    void pair(const bf16* first, const bf16* second, std::int64_t at, std::int64_t rows, bf16* out) const {
        using Pair = std::uint32_t __attribute__((may_alias));
        for (std::int64_t j = 0; j < width; j += wide, out += rows * wide) {
            Pair* __restrict to = reinterpret_cast<Pair*>(out + at * wide);
            const std::int64_t n = smaller(wide, width - j);
            for (std::int64_t k = 0; first && second && k < n; ++k)
                to[k] = first[j + k].bits | static_cast<std::uint32_t>(second[j + k].bits) << 16;
            for (std::int64_t k = 0; !second && k < n; ++k) to[k] = first ? first[j + k].bits : 0;
            for (std::int64_t k = n; k < wide; ++k) to[k] = 0;
        }
    }

    // Transposes one panel (tile, panel) into rows of tokens (panel, Shape::tile), with zeros up to a multiple of
    // `step`.
    void transpose(const float* z, std::int64_t size, bf16* out) {
        static_assert(S::panel % 8 == 0 && S::tile % 8 == 0);
        const std::int64_t whole = ceil_div(size, step) * step;
        narrow_row(z, panel_, size * S::panel);
        for (std::int64_t i = size * S::panel; i < whole * S::panel; ++i) panel_[i] = bf16{0};
        for (std::int64_t t = 0; t < whole; t += 8)
            for (std::int64_t i = 0; i < S::panel; i += 8)
                transpose_8x8(panel_ + t * S::panel + i, S::panel, out + i * S::tile + t, S::tile);
    }

    // Transposes by interleaving rows i and i + 4, three times.
    static void transpose_8x8(const bf16* in, std::int64_t in_stride, bf16* out, std::int64_t out_stride) {
        using Row = std::uint16_t __attribute__((vector_size(16)));
        Row a[8], b[8];
        for (int i = 0; i < 8; ++i) std::memcpy(&a[i], in + i * in_stride, sizeof(Row));
        for (int step = 0; step < 3; ++step) {
            for (int i = 0; i < 4; ++i) {
#ifdef __clang__
                b[2 * i] = __builtin_shufflevector(a[i], a[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
                b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
#else  // GCC has __builtin_shufflevector only since version 12
                b[2 * i] = __builtin_shuffle(a[i], a[i + 4], Row{0, 8, 1, 9, 2, 10, 3, 11});
                b[2 * i + 1] = __builtin_shuffle(a[i], a[i + 4], Row{4, 12, 5, 13, 6, 14, 7, 15});
#endif
            }
            for (int i = 0; i < 8; ++i) a[i] = b[i];
        }
        for (int i = 0; i < 8; ++i) std::memcpy(out + i * out_stride, &a[i], sizeof(Row));
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
