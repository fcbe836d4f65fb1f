#pragma once

// One worker's view of the (rows, vocabulary) tiles of a linear head, with the three products on them. Every op that
// goes through a vocabulary is built on this.

#include "cpu/base/problem.h"
#include "cpu/base/workspace.h"
#include "cpu/tiles/products-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// A block of scored rows, and where their tokens are.
template <typename In>
struct RowBlock {
    const HeadProblem& problem;
    std::int64_t first, count;  // in the order of the scored rows
    std::int64_t token(std::int64_t i) const { return problem.rows ? problem.rows[first + i] : first + i; }
    const In* hidden(std::int64_t i) const {
        return static_cast<const In*>(problem.hidden) + token(i) * problem.hidden_stride;
    }
};

// Consecutive vocabulary entries: rows of the weight.
template <typename In>
struct WeightTile {
    const In* at;
    std::int64_t stride, begin, size;
    WeightTile(const HeadProblem& p, std::int64_t begin, std::int64_t size)
        : at(static_cast<const In*>(p.weight) + begin * p.weight_stride), stride(p.weight_stride), begin(begin),
          size(size) {}
};

// The index of the first of `count` ascending numbers that is not below x. std::lower_bound is not used, because it
// would have one name for all instruction sets, and the linker would pick one version.
inline std::int64_t lower_bound(const std::int64_t* rising, std::int64_t count, std::int64_t x) {
    std::int64_t first = 0;
    for (std::int64_t end = count; first < end;) {
        const std::int64_t middle = (first + end) / 2;
        if (rising[middle] < x) first = middle + 1;
        else end = middle;
    }
    return first;
}

// Calls f(row, index among the token's targets, entry in the tile) for the targets of rows [first, last) in the tile.
template <typename In, typename F>
void each_target(const RowBlock<In>& block, std::int64_t first, std::int64_t last, const WeightTile<In>& weight,
                 const F& f) {
    const std::int64_t count = block.problem.targets_per_token, tile_end = weight.begin + weight.size;
    for (std::int64_t i = first; i < smaller(last, block.count); ++i) {
        const std::int64_t* targets = block.problem.targets + block.token(i) * count;
        for (std::int64_t at = lower_bound(targets, count, weight.begin); at < count && targets[at] < tile_end; ++at)
            f(i, at, targets[at] - weight.begin);
    }
}

// Packs hidden states as vectors of tokens, (panels, width, panel). Columns of the last panel without a token are 0.
template <typename T, typename In>
void pack_panels(const RowBlock<In>& block, std::int64_t width, T* out) {
    constexpr std::int64_t P = Shape<T>::panel, step = 64;
    for (std::int64_t p = 0; p < ceil_div(block.count, P); ++p)
        for (std::int64_t k0 = 0; k0 < width; k0 += step) {
            const std::int64_t kn = smaller(step, width - k0);
            for (std::int64_t i = 0; i < P; ++i) {
                T* to = out + (p * width + k0) * P + i;
                if (p * P + i < block.count) {
                    const In* from = block.hidden(p * P + i) + k0;
                    for (std::int64_t k = 0; k < kn; ++k) to[k * P] = widen(from[k]);
                } else {
                    for (std::int64_t k = 0; k < kn; ++k) to[k * P] = 0;
                }
            }
        }
}

// Packs hidden states as vectors of columns, (width / panel, padded rows, panel). Padded rows and columns are 0.
template <typename T, typename In>
void pack_strips(const RowBlock<In>& block, std::int64_t width, T* out) {
    constexpr std::int64_t P = Shape<T>::panel;
    const std::int64_t padded = ceil_div(block.count, P) * P, strips = ceil_div(width, P);
    for (std::int64_t i = 0; i < padded; ++i)
        for (std::int64_t j = 0; j < strips; ++j) {
            T* to = out + (j * padded + i) * P;
            const std::int64_t n = i < block.count ? smaller(P, width - j * P) : 0;
            for (std::int64_t x = n; x < P; ++x) to[x] = 0;
            if (n > 0) widen_row(block.hidden(i) + j * P, to, n);
        }
}

// Which products a worker will need. Only their scratch memory is allocated. With `shared`, the rows for `outer` are
// not in the memory of the worker (see `use_strips`).
struct TileProducts {
    bool logits, fold, outer, shared = false;
};

// In the products below z is (panels, Shape::tile, panel). Of each panel the first `weight.size` entries are used.
template <typename T, typename In>
class Tiles {
    using S = Shape<T>;
    T *hidden_, *strips_, *weight_, *column_;

public:
    std::int64_t width, padded_width;

    Tiles(Carver& c, std::int64_t rows, std::int64_t width, TileProducts needs)
        : width(width), padded_width(ceil_div(width, S::panel) * S::panel) {
        hidden_ = c.take<T>(needs.logits ? rows * width : 0);
        strips_ = c.take<T>(needs.outer && !needs.shared ? strips_size(rows, width) : 0);
        weight_ = c.take<T>(sizeof(In) == sizeof(T) || !needs.logits ? 0 : S::tile * S::depth);
        column_ = c.take<T>(needs.fold ? S::tile * S::panel : 0);
    }

    // Packed rows for `outer`. Several workers may share them: then `use_strips` says where they are.
    using Strip = T;
    static std::int64_t strips_size(std::int64_t rows, std::int64_t width) {
        return rows * ceil_div(width, S::panel) * S::panel;
    }
    void use_strips(Strip* strips) { strips_ = strips; }
    // Tells the number of tokens in the present block, so that products can end after them. Not needed here.
    void take_count(std::int64_t) {}

    // Pack a block of rows for `logits`, and for `outer`.
    void take_rows(const RowBlock<In>& block) { pack_panels(block, width, hidden_); }
    void take_rows_for_outer(const RowBlock<In>& block) { pack_strips(block, width, strips_); }

    // u = h W' for the panels [first, last) of the block.
    void logits(const WeightTile<In>& weight, std::int64_t first, std::int64_t last, T* z) {
        logits_product(hidden_ + first * width * S::panel, last - first, width, weight.at, weight.stride, weight.size,
                       z + first * S::tile * S::panel, weight_);
    }
    // out (rows, padded_width) = z' W if `fresh`, else +=. `again`: W is the same as in the last call.
    void fold(const T* z, std::int64_t panels, const WeightTile<In>& weight, T* out, bool fresh, bool again = false) {
        (void)again;  // nothing of W is cached here
        fold_product(z, panels, width, weight.at, weight.stride, weight.size, out, padded_width, column_, fresh);
    }
    // out (tile, padded_width) = z h if `fresh`, else +=: the gradient of the weight.
    void outer(const T* z, std::int64_t panels, std::int64_t tile, T* out, bool fresh = false) {
        outer_product(z, panels, width, strips_, tile, out, padded_width, fresh);
    }
    // Called when the worker is done.
    void release() {}
};

// sums (tile, lanes) += a gradient tile (panels, tile, panel), summed over its tokens: the gradient of the bias. Each
// lane is summed separately, over the panels in order, and the caller adds the lanes at the end. So the result does not
// depend on the size of a block.
template <typename T>
void add_bias(const T* z, std::int64_t panels, std::int64_t tile, T* sums) {
    using S = Shape<T>;
    for (std::int64_t p = 0; p < panels; ++p)
        for (std::int64_t t = 0; t < tile; ++t)
            for (int j = 0; j < S::vectors; ++j) {
                T* sum = sums + t * lanes<T>;
                store(sum, load(sum) + load(z + (p * S::tile + t) * S::panel + j * lanes<T>));
            }
}

// Rows of a block: as many as fit the budget of a worker, but no more than `most` and no more than there are. The
// result of a row does not depend on it, but a sum over rows does. For such sums the budget must not depend on the
// number of workers.
template <typename T>
std::int64_t rows_per_block(std::int64_t scored, std::int64_t bytes_per_row, std::int64_t most, std::int64_t budget) {
    constexpr std::int64_t P = Shape<T>::panel;
    const std::int64_t rows = smaller(smaller(most, budget / bytes_per_row) / P * P, ceil_div(scored, P) * P);
    return rows < P ? P : rows;
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
