#pragma once

// The backward pass of linear_logprobs and of sparse_divergence, for a trainable head.

#include <cstring>

#include "cpu/kernels/linear_logprobs-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// The gradient of a trainable head. A unit of work is one chunk of the vocabulary. One worker computes all rows for it
// in order, so every entry of the weight's gradient is summed by one worker in one order.
template <typename T, typename In>
class BackwardPass {
    using S = Shape<T>;
    const BackwardProblem& p_;
    const Head<T> head_;
    const std::int64_t padded_width_, tiles_;
    std::int64_t chunk_, chunks_, block_rows_, blocks_;
    using Strip = typename Tiles<T, In>::Strip;
    Strip* strips_ = nullptr;  // all rows, packed once, because every chunk needs them for the weight's gradient

    struct Scratch {
        Tiles<T, In> tiles;
        T *z, *a, *d_weight, *d_bias;
        Coefficients<T> c;
    };

    Scratch carve(Carver& c, std::int64_t rows) const {
        const TileProducts needs{recomputes(), p_.d_hidden != nullptr, p_.d_weight != nullptr, true};
        Scratch s{Tiles<T, In>(c, rows, p_.width, needs), {}, {}, {}, {}, {}};
        s.z = c.take<T>(rows * S::tile);
        s.a = c.take<T>(p_.d_hidden ? rows * padded_width_ : 0);
        s.d_weight = c.take<T>(p_.d_weight ? chunk_ * padded_width_ : 0);
        s.d_bias = c.take<T>(p_.d_bias ? chunk_ * lanes<T> : 0);
        s.c.shift = c.take<T>(rows), s.c.mean = c.take<T>(rows), s.c.logprob = c.take<T>(rows);
        s.c.entropy = c.take<T>(rows), s.c.target = c.take<T>(rows);
        return s;
    }

public:
    explicit BackwardPass(const BackwardProblem& p)
        : p_(p), head_(p.logit_scale, p.softcap, p.temperature),
          padded_width_(ceil_div(p.width, S::panel) * S::panel), tiles_(ceil_div(p.vocab, S::tile)) {
        // The sizes of chunks and blocks depend on the width and on which gradients are needed only. Batch and number
        // of threads must not change them, because they determine the order of summation. So the scratch memory grows
        // with the number of workers here, while in the forward pass the workers share one budget.
        const std::int64_t fit = kWeightBudget / static_cast<std::int64_t>(S::tile * padded_width_ * sizeof(T));
        chunk_ = (fit < 1 ? 1 : smaller(fit, 4)) * S::tile;
        chunks_ = ceil_div(p.vocab, chunk_);
        const std::int64_t sheets = recomputes() + (p.d_hidden != nullptr) + (p.d_weight != nullptr);
        const std::int64_t row_bytes = sizeof(T) * (sheets * padded_width_ + S::tile + 8);
        block_rows_ = rows_per_block<T>(p.scored, row_bytes, kMostRows, kRowsBudget);
        blocks_ = ceil_div(p.scored, block_rows_);
    }

    void run(Pool pool) {
        pool.workers = static_cast<int>(smaller(pool.workers, chunks_));
        Carver size(nullptr);
        carve(size, block_rows_);
        const std::size_t strips = p_.d_weight ? blocks_ * strips_size() * sizeof(Strip) : 0;
        Workspace workspace(pool.workers * size.used() + strips);
        strips_ = reinterpret_cast<Strip*>(workspace.data() + pool.workers * size.used());
        OrderedItems packing(p_.d_weight ? blocks_ : 0, 0), items(chunks_, blocks_);
        auto scratch = [&](int worker) {
            Carver own(workspace.data() + worker * size.used());
            return carve(own, block_rows_);
        };
        pool.run([&](int worker) {
            Scratch s = scratch(worker);
            for (std::int64_t b; packing.next(b);) {
                s.tiles.take_count(block(b).count);
                s.tiles.use_strips(strips_ + b * strips_size());
                s.tiles.take_rows_for_outer(block(b));
            }
        });
        pool.run([&](int worker) {
            Scratch s = scratch(worker);
            for (std::int64_t chunk; items.next(chunk);) run_chunk(chunk, items, s);
            s.tiles.release();
        });
    }

private:
    bool recomputes() const { return !p_.cache || p_.cache_rows < p_.scored; }
    std::int64_t strips_size() const { return Tiles<T, In>::strips_size(block_rows_, p_.width); }
    RowBlock<In> block(std::int64_t b) const {
        return {p_, b * block_rows_, smaller(block_rows_, p_.scored - b * block_rows_)};
    }

    void run_chunk(std::int64_t chunk, OrderedItems& items, Scratch& s) {
        const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p_.vocab);
        if (p_.d_bias) std::memset(s.d_bias, 0, (end - begin) * lanes<T> * sizeof(T));
        for (std::int64_t b = 0; b < blocks_; ++b) {
            const RowBlock<In> block = this->block(b);
            const std::int64_t panels = ceil_div(block.count, S::panel);
            coefficients(block, s.c);
            s.tiles.take_count(block.count);
            if (recomputes()) s.tiles.take_rows(block);
            s.tiles.use_strips(strips_ + b * strips_size());
            for (std::int64_t v = begin; v < end; v += S::tile) {
                const WeightTile<In> weight(p_, v, smaller(S::tile, end - v));
                gradient_tile(block, panels, weight, s);
                if (p_.d_hidden) s.tiles.fold(s.z, panels, weight, s.a, v == begin, b > 0 && chunk_ == S::tile);
                if (p_.d_weight)
                    s.tiles.outer(s.z, panels, weight.size, s.d_weight + (v - begin) * padded_width_, b == 0);
                if (p_.d_bias) add_bias(s.z, panels, weight.size, s.d_bias + (v - begin) * lanes<T>);
            }
            if (!p_.d_hidden) continue;
            // All chunks add to the same rows of d_hidden, each when the chunk before it is done with the block. So the
            // order of additions does not depend on the number of threads.
            items.wait(b, chunk);
            add_hidden(block, s);
            items.done(b, chunk);
        }
        write_chunk(begin, end - begin, s);
    }

    // Writes the gradient in u = h W' + b of one tile, (panels, tile, panel), into s.z.
    void gradient_tile(const RowBlock<In>& block, std::int64_t panels, const WeightTile<In>& weight, Scratch& s) {
        const std::int64_t first_panel = block.first / S::panel;
        std::int64_t kept = p_.cache ? p_.cache_rows / S::panel - first_panel : 0;
        kept = kept < 0 ? 0 : smaller(kept, panels);
        if (kept < panels) s.tiles.logits(weight, kept, panels, s.z);
        for (std::int64_t p = 0; p < panels; ++p) {
            const std::int64_t row = p * S::panel;
            const Coefficients<T> c{s.c.shift + row, s.c.mean + row, s.c.logprob + row,
                                    p_.grad_entropy ? s.c.entropy + row : nullptr, s.c.target + row};
            T* z = s.z + row * S::tile;
            if (p < kept) {
                from_cache(first_panel + p, weight, z, c);
            } else {
                const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + weight.begin : nullptr;
                differentiate(z, weight.size, bias, head_, c);
            }
        }
        // The formula above holds for every entry but the targets, which are overwritten.
        each_target(block, 0, block.count, weight, [&](std::int64_t i, std::int64_t place, std::int64_t column) {
            const T* own = at_row<const T>(p_.grad_targets, block.token(i), p_.targets_per_token);
            s.z[(i / S::panel * S::tile + column) * S::panel + i % S::panel] = own ? own[place] : s.c.target[i];
        });
    }

    void from_cache(std::int64_t panel, const WeightTile<In>& weight, T* z, const Coefficients<T>& c) const {
        const In* cache = static_cast<const In*>(p_.cache) + (panel * p_.vocab + weight.begin) * S::panel;
        const T* then = static_cast<const T*>(p_.shifts) + (panel * tiles_ + weight.begin / S::tile) * S::panel;
        differentiate_kept(cache, z, weight.size, head_, c, then);
    }

    // The gradient in a logit z_j that is not the target's is -g p_j = c.logprob exp(z_j - shift), with
    // c.logprob = -g / total. The target's is g (1 - p_y). It is formed here as g others / total: near p_y = 1 the
    // difference 1 - p_y has no digits left. For sparse_divergence only the entries outside of the top k count, and the
    // caller gives the targets' gradients.
    void coefficients(const RowBlock<In>& block, const Coefficients<T>& c) const {
        for (std::int64_t i = 0; i < ceil_div(block.count, S::panel) * S::panel; ++i) {
            c.shift[i] = -static_cast<T>(kStart);  // makes the exponentials of padded rows 0
            c.mean[i] = c.logprob[i] = c.entropy[i] = c.target[i] = 0;
            if (i >= block.count) continue;
            const std::int64_t token = block.token(i);
            const T g = static_cast<const T*>(p_.grad_logprobs)[token];
            const T* stats = at_row<const T>(p_.stats, token, p_.grad_targets ? kSparseStats : kStats);
            if (p_.grad_targets) {
                c.shift[i] = stats[kShift], c.logprob[i] = stats[kOthers] > 0 ? g / stats[kOthers] : T(0);
                continue;
            }
            const T total = stats[kOthers] + stats[kTarget];
            c.shift[i] = stats[kShift], c.mean[i] = stats[kMean], c.logprob[i] = -g / total;
            T value = g * (stats[kOthers] / total);
            if (p_.grad_entropy) {
                const T g_entropy = static_cast<const T*>(p_.grad_entropy)[token], shifted = std::log(stats[kTarget]);
                const T bounded = shifted < static_cast<T>(kStart) ? static_cast<T>(kStart) : shifted;
                c.entropy[i] = -g_entropy / total;
                value -= g_entropy * (stats[kTarget] / total) * (bounded - stats[kMean]);
            }
            c.target[i] = value * stats[kSlope];
        }
    }

    void add_hidden(const RowBlock<In>& block, const Scratch& s) const {
        for (std::int64_t i = 0; i < block.count; ++i) {
            T* to = at_row<T>(p_.d_hidden, block.token(i), p_.width);
            const T* from = s.a + i * padded_width_;
            for (std::int64_t k = 0; k < p_.width; ++k) to[k] += from[k];
        }
    }

    void write_chunk(std::int64_t begin, std::int64_t size, const Scratch& s) const {
        for (std::int64_t t = 0; t < size; ++t) {
            if (p_.d_weight)
                narrow_row(s.d_weight + t * padded_width_, static_cast<In*>(p_.d_weight) + (begin + t) * p_.width, p_.width);
            if (!p_.d_bias) continue;
            T sum = 0;
            for (int i = 0; i < lanes<T>; ++i) sum += s.d_bias[t * lanes<T> + i];
            static_cast<T*>(p_.d_bias)[begin + t] = sum;
        }
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
