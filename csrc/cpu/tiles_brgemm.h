#pragma once

// The tile machinery for bfloat16 on machines whose matrix units take it: same tiles, products by libtorch's BRGEMM.
// Tested with a plain stand-in for BRGEMM (csrc/check/check.cpp); not yet run on a machine with AMX or AVX-512 BF16.
// The tile of probabilities enters its products rounded to bfloat16, as is usual on such units.

#include "brgemm.h"
#include "tiles.h"

namespace fastalign {
namespace FASTALIGN_ISA {

template <>
class Tiles<float, bf16> {
    using S = Shape<float>;
    static constexpr std::int64_t deep = 512, wide = 64;  // one product's contraction, and columns of the output
    bf16 *hidden_, *strips_, *pairs_, *left_;

    std::int64_t even_width() const { return (width + 1) / 2 * 2; }

public:
    std::int64_t width, padded_width;

    Tiles(Carver& c, std::int64_t rows, std::int64_t width, TileProducts needs)
        : width(width), padded_width(ceil_div(width, S::panel) * S::panel) {
        hidden_ = c.take<bf16>(needs.logits ? rows * (width + 1) : 0);
        strips_ = c.take<bf16>(needs.outer ? rows * padded_width : 0);
        pairs_ = c.take<bf16>(needs.fold || width % 2 ? (S::tile + 1) * padded_width : 0);
        left_ = c.take<bf16>(needs.fold || needs.outer ? rows * S::tile : 0);
    }

    // (panels, width / 2, panel, 2)
    void take_rows(const RowBlock<bf16>& block) {
        const std::int64_t even = even_width();
        for (std::int64_t i = 0; i < ceil_div(block.count, S::panel) * S::panel; ++i) {
            bf16* to = hidden_ + i / S::panel * even * S::panel + i % S::panel * 2;
            for (std::int64_t k = 0; k < even; ++k)
                to[k / 2 * S::panel * 2 + k % 2] = i < block.count && k < width ? block.hidden(i)[k] : bf16{0};
        }
    }
    // (padded rows / 2, padded_width, 2)
    void take_rows_for_outer(const RowBlock<bf16>& block) {
        for (std::int64_t i = 0; i < ceil_div(block.count, S::panel) * S::panel; ++i)
            for (std::int64_t k = 0; k < padded_width; ++k)
                strips_[(i / 2 * padded_width + k) * 2 + i % 2] =
                    i < block.count && k < width ? block.hidden(i)[k] : bf16{0};
    }

    void logits(const WeightTile<bf16>& weight, std::int64_t first, std::int64_t last, float* z) {
        const std::int64_t even = even_width();
        const bf16* left = weight.at;
        std::int64_t row = weight.stride;
        if (width % 2) {  // a pair would reach into the next row: copy, with a zero at the end
            for (std::int64_t t = 0; t < weight.size; ++t)
                for (std::int64_t k = 0; k < even; ++k)
                    pairs_[t * even + k] = k < width ? weight.at[t * weight.stride + k] : bf16{0};
            left = pairs_, row = even;
        }
        for (std::int64_t p = first; p < last; ++p)
            for (std::int64_t k = 0; k < even; k += deep)
                brgemm_bf16(weight.size, S::panel, smaller(deep, even - k), row, S::panel, S::panel, k > 0, left + k,
                            hidden_ + (p * even + k) * S::panel, z + p * S::tile * S::panel, true);
    }

    void fold(const float* z, std::int64_t panels, const WeightTile<bf16>& weight, float* out, bool fresh) {
        const std::int64_t even = (weight.size + 1) / 2 * 2;
        for (std::int64_t t = 0; t < even; ++t)  // (tile / 2, padded_width, 2)
            for (std::int64_t k = 0; k < padded_width; ++k)
                pairs_[(t / 2 * padded_width + k) * 2 + t % 2] =
                    t < weight.size && k < width ? weight.at[t * weight.stride + k] : bf16{0};
        for (std::int64_t p = 0; p < panels; ++p) transpose(z + p * S::tile * S::panel, weight.size, even, p);
        for (std::int64_t j = 0; j < padded_width; j += wide)
            brgemm_bf16(panels * S::panel, smaller(wide, padded_width - j), even, S::tile, padded_width, padded_width,
                        !fresh, left_, pairs_ + j * 2, out + j, true);
    }

    void outer(const float* z, std::int64_t panels, std::int64_t tile, float* out) {
        for (std::int64_t p = 0; p < panels; ++p) {
            narrow_row(z + p * S::tile * S::panel, left_, tile * S::panel);
            const bf16* right = strips_ + p * S::panel * padded_width;
            for (std::int64_t j = 0; j < padded_width; j += wide)
                brgemm_bf16(tile, smaller(wide, padded_width - j), S::panel, S::panel, padded_width, padded_width, true,
                            left_, right + j * 2, out + j, true);
        }
    }

    void release() {
        if (brgemm_release) brgemm_release(true);
    }

private:
    // One panel (tile, panel) into rows of tokens (panel, Shape::tile), zeros up to `even`.
    void transpose(const float* z, std::int64_t size, std::int64_t even, std::int64_t p) {
        for (std::int64_t i = 0; i < S::panel; ++i) {
            bf16* to = left_ + (p * S::panel + i) * S::tile;
            for (std::int64_t t = 0; t < size; ++t) narrow(z[t * S::panel + i], to[t]);
            for (std::int64_t t = size; t < even; ++t) to[t] = bf16{0};
        }
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
