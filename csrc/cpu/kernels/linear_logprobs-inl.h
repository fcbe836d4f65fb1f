#pragma once

// The forward pass of linear_logprobs and of sparse_divergence. sparse_divergence has k targets per token instead of
// one. It needs their logits, and separately the sum over all other entries (the tail). `ForwardProblem::picked` tells
// the two apart: it is null for linear_logprobs, and receives the targets' logits for sparse_divergence.
//
// A unit of work (an item) is one chunk of the vocabulary for one block of rows. Any worker may take it and computes
// the sums of the chunk alone, in its scratch memory (`scan`). The sums are then added to the totals of the rows in the
// order of the vocabulary (`merge`). So the result of a token depends neither on the batch nor on the number of
// threads.

#include "cpu/base/pool.h"
#include "cpu/tiles/softmax-inl.h"
#include "cpu/tiles/tiles-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

constexpr std::int64_t kChunkTiles = 8;             // tiles per chunk in the forward pass
constexpr std::int64_t kScratchBudget = 24u << 20;  // bytes of scratch in the forward pass, for all workers together
constexpr std::int64_t kRowsBudget = 12u << 20;     // bytes per worker for its rows in the backward pass
constexpr std::int64_t kWeightBudget = 4u << 20;    // bytes per worker for its part of the weight's gradient
constexpr std::int64_t kMostRows = 192;             // with more rows the tile of logits does not fit L2
// The columns of a token's statistics, the fields of `Stats` in fastalign/ops/head/epilogue.py.
enum Stat {
    kShift,                      // m, what exponentials are taken relative to
    kOthers,                     // sum of exp(z - m) without the target, for sparse_divergence without all targets
    kTarget,                     // exp(z_y - m) of the target y
    kSlope,                      // dz/du at the target
    kMean,                       // the mean of z - m; 0 unless the entropy is wanted
    kStats,                      // how many columns linear_logprobs has
    kSparseStats = kOthers + 1   // how many columns sparse_divergence has: shift and others
};

template <typename T, typename Base>
T* at_row(Base* base, std::int64_t row, std::int64_t width) {
    return base ? static_cast<T*>(base) + row * width : nullptr;
}

template <typename T, typename In>
class ForwardPass {
    using S = Shape<T>;
    const ForwardProblem& p_;
    const Head<T> head_;
    const bool gradients_, entropy_, entropy_gradient_, details_;
    const std::int64_t padded_width_, chunk_, chunks_, tiles_;
    std::int64_t block_rows_, blocks_;
    Sums<T> totals_{};
    T* target_logits_ = nullptr;  // (rows,), for linear_logprobs only

    // The memory of one worker, for `rows` rows. Under a soft cap the exponentials are multiplied by the slope dz/du.
    struct Scratch {
        Tiles<T, In> tiles;  // the rows' hidden states, laid out for the products
        T *z,                // panels of (tile, panel): products, then logits, then exp(z - shift)
            *zweighted,      // likewise, exp(z - shift) (z - shift); only for the gradient of the entropy
            *a,              // (rows, padded_width) sum of exp(z - shift) W; only with gradients
            *b,              // (rows, padded_width) the same with zweighted; only for the gradient of the entropy
            *shrink,         // (rows,) of the latest tile, the factor exp(moved)
            *moved;          // (rows,) of the latest tile, old shift minus new shift
        Sums<T> sums;        // (rows,) each, of the chunk
    };

    Scratch carve(Carver& c, std::int64_t rows) const {
        const std::int64_t sheet = gradients_ ? rows * padded_width_ : 0;
        Scratch s{Tiles<T, In>(c, rows, p_.width, {true, gradients_, false}), {}, {}, {}, {}, {}, {}, {}};
        s.z = c.take<T>(rows * S::tile);
        s.zweighted = c.take<T>(entropy_gradient_ ? rows * S::tile : 0);
        s.a = c.take<T>(sheet);
        s.b = c.take<T>(entropy_gradient_ ? sheet : 0);
        s.shrink = c.take<T>(rows), s.moved = c.take<T>(rows);
        s.sums = take_sums(c, rows);
        return s;
    }
    Sums<T> take_sums(Carver& c, std::int64_t rows) const {
        Sums<T> sums{};
        sums.shift = c.take<T>(rows), sums.others = c.take<T>(rows), sums.zothers = c.take<T>(rows);
        if (details_) sums.squares = c.take<T>(rows), sums.logits = c.take<T>(rows), sums.rival = c.take<T>(rows);
        return sums;
    }
    void take_totals(Carver& c, std::int64_t rows) { totals_ = take_sums(c, rows), target_logits_ = c.take<T>(rows); }

public:
    explicit ForwardPass(const ForwardProblem& p)
        : p_(p), head_(p.logit_scale, p.softcap, p.temperature), gradients_(p.grad_logprobs), entropy_(p.entropy),
          entropy_gradient_(p.grad_entropy), details_(p.details),
          padded_width_(ceil_div(p.width, S::panel) * S::panel), chunk_(kChunkTiles * S::tile),
          chunks_(ceil_div(p.vocab, chunk_)), tiles_(ceil_div(p.vocab, S::tile)) {}

    void run(Pool pool) {
        const std::int64_t sheets = gradients_ ? 1 + entropy_gradient_ : 0;
        const std::int64_t row_bytes = sizeof(T) * (p_.width + sheets * padded_width_ + (1 + entropy_gradient_) * S::tile + 11);
        block_rows_ = rows_per_block<T>(p_.scored, row_bytes, kMostRows, kScratchBudget / pool.workers);
        blocks_ = ceil_div(p_.scored, block_rows_);
        const std::int64_t rows = blocks_ * block_rows_;
        pool.workers = static_cast<int>(smaller(pool.workers, chunks_ * blocks_));
        Carver size(nullptr);
        carve(size, block_rows_);
        Carver totals_size(nullptr);
        take_totals(totals_size, rows);
        Workspace workspace(pool.workers * size.used() + totals_size.used());
        Carver totals(workspace.data() + pool.workers * size.used());
        take_totals(totals, rows);
        OrderedItems items(chunks_ * blocks_, blocks_);
        pool.run([&](int worker) {
            Carver own(workspace.data() + worker * size.used());
            Scratch scratch = carve(own, block_rows_);
            for (std::int64_t item; items.next(item);) {
                const std::int64_t chunk = item / blocks_, index = item % blocks_, first = index * block_rows_;
                const RowBlock<In> block{p_, first, smaller(block_rows_, p_.scored - first)};
                scan(block, chunk, scratch);
                items.wait(index, chunk);
                merge(block, chunk, scratch);
                items.done(index, chunk);
            }
            scratch.tiles.release();
        });
    }

private:
    // Computes the sums of one chunk of the vocabulary for one block of rows, in the memory of the worker.
    void scan(const RowBlock<In>& block, std::int64_t chunk, Scratch& s) const {
        const std::int64_t panels = ceil_div(block.count, S::panel);
        const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p_.vocab);
        s.tiles.take_count(block.count);
        s.tiles.take_rows(block);
        for (std::int64_t i = 0; i < panels * S::panel; ++i) {
            s.sums.shift[i] = static_cast<T>(kStart);
            s.sums.others[i] = s.sums.zothers[i] = 0;
            if (details_) s.sums.squares[i] = s.sums.logits[i] = 0, s.sums.rival[i] = static_cast<T>(kStart);
        }
        for (std::int64_t v = begin; v < end; v += S::tile) {
            const WeightTile<In> weight(p_, v, smaller(S::tile, end - v));
            s.tiles.logits(weight, 0, panels, s.z);
            for (std::int64_t p = 0; p < panels; ++p) absorb_panel(block, p, weight, v == begin, s);
            if (gradients_) s.tiles.fold(s.z, panels, weight, s.a, v == begin);
            if (entropy_gradient_) s.tiles.fold(s.zweighted, panels, weight, s.b, v == begin);
        }
    }

    void absorb_panel(const RowBlock<In>& block, std::int64_t p, const WeightTile<In>& weight, bool first,
                      Scratch& s) const {
        const std::int64_t row = p * S::panel, tile = weight.size;
        T *z = s.z + row * S::tile, largest[S::panel];
        Sums<T> sums{s.sums.shift + row, s.sums.others + row, s.sums.zothers + row};
        if (details_)
            sums.squares = s.sums.squares + row, sums.logits = s.sums.logits + row, sums.rival = s.sums.rival + row;
        const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + weight.begin : nullptr;
        to_logits(z, tile, bias, head_, largest, sums.logits);
        if (details_) take_rivals(block, row, weight, z, largest, sums.rival);
        take_targets(block, row, weight, z, largest);
        T* zweighted = entropy_gradient_ ? s.zweighted + row * S::tile : nullptr;
        const bool moved = absorb(z, tile, largest, head_, sums, entropy_, gradients_ || p_.cache, zweighted,
                                  s.shrink + row, s.moved + row);
        if (moved && !first && gradients_) rescale(row, s);
        if (block.first + row < p_.cache_rows) keep(block.first / S::panel + p, weight.begin, tile, z, sums.shift);
    }

    // Raises each token's `rival` to the largest logit of the tile. Of equal logits the first one is on top, so a logit
    // behind the target has to be above the target's: it counts as the next smaller number, and `target > rival` decides.
    void take_rivals(const RowBlock<In>& block, std::int64_t row, const WeightTile<In>& weight, const T* z,
                     const T* largest, T* rival) const {
        const T low = -std::numeric_limits<T>::infinity();
        for (std::int64_t i = 0; i < smaller(S::panel, block.count - row); ++i) {
            const std::int64_t target = p_.targets[block.token(row + i)] - weight.begin;
            T before = target >= weight.size ? largest[i] : low, behind = target < 0 ? largest[i] : low;
            for (std::int64_t t = 0; target >= 0 && target < weight.size && t < weight.size; ++t) {
                T& top = t < target ? before : behind;
                if (t != target && z[t * S::panel + i] > top) top = z[t * S::panel + i];
            }
            if (behind > low) behind = std::nextafter(behind, low);
            if (before > rival[i]) rival[i] = before;
            if (behind > rival[i]) rival[i] = behind;
        }
    }

    // Stores the targets' logits of a panel, and removes them from the tile, so that the sums leave them out.
    // In sparse_divergence the targets can be much larger than the rest, so the maximum is recomputed without them.
    // In linear_logprobs the maximum may include the target.
    void take_targets(const RowBlock<In>& block, std::int64_t row, const WeightTile<In>& weight, T* z,
                      T* largest) const {
        each_target(block, row, row + S::panel, weight, [&](std::int64_t i, std::int64_t place, std::int64_t column) {
            T* kept = at_row<T>(p_.picked, block.token(i), p_.targets_per_token);
            if (!kept) kept = target_logits_ + block.first + i;
            T &logit = z[column * S::panel + i - row], &top = largest[i - row];
            const bool tops = p_.picked && logit >= top;
            kept[place] = logit;
            logit = -std::numeric_limits<T>::infinity();  // exp gives exactly 0
            if (!tops) return;
            top = static_cast<T>(kStart);
            for (std::int64_t t = 0; t < weight.size; ++t) top = vmax(z[t * S::panel + i - row], top);
        });
    }

    void rescale(std::int64_t row, Scratch& s) const {
        for (std::int64_t i = row; i < row + S::panel; ++i) {
            if (s.moved[i] == 0) continue;
            T *a = s.a + i * padded_width_, *b = s.b + i * padded_width_;
            if (entropy_gradient_)
                for (std::int64_t k = 0; k < padded_width_; ++k) b[k] = s.shrink[i] * (b[k] + s.moved[i] * a[k]);
            for (std::int64_t k = 0; k < padded_width_; ++k) a[k] *= s.shrink[i];
        }
    }

    void keep(std::int64_t panel, std::int64_t v, std::int64_t tile, const T* z, const T* shift) const {
        In* cache = static_cast<In*>(p_.cache) + (panel * p_.vocab + v) * S::panel;
        narrow_row(z, cache, tile * S::panel);
        T* shifts = static_cast<T*>(p_.shifts) + (panel * tiles_ + v / S::tile) * S::panel;
        for (std::int64_t i = 0; i < S::panel; ++i) shifts[i] = shift[i];
    }

    // Adds the sums of a chunk to the totals of its rows. After the last chunk it writes the results.
    void merge(const RowBlock<In>& block, std::int64_t chunk, Scratch& s) {
        for (std::int64_t i = 0; i < block.count; ++i) {
            const std::int64_t row = block.first + i, token = block.token(i);
            T *a = at_row<T>(p_.grad_logprobs, token, p_.width), *b = at_row<T>(p_.grad_entropy, token, p_.width);
            const T *chunk_a = s.a + i * padded_width_, *chunk_b = s.b + i * padded_width_;
            if (chunk == 0) {
                totals_.shift[row] = s.sums.shift[i], totals_.others[row] = s.sums.others[i];
                totals_.zothers[row] = s.sums.zothers[i];
                if (details_) {
                    totals_.squares[row] = s.sums.squares[i], totals_.logits[row] = s.sums.logits[i];
                    totals_.rival[row] = s.sums.rival[i];
                }
                for (std::int64_t k = 0; gradients_ && k < p_.width; ++k) a[k] = chunk_a[k];
                for (std::int64_t k = 0; b && k < p_.width; ++k) b[k] = chunk_b[k];
            } else {
                add_chunk(row, s.sums, i, a, chunk_a, b, chunk_b);
            }
            if (chunk == chunks_ - 1) p_.picked ? finish_tail(row, token, a) : finish(row, token, a, b);
        }
    }

    void add_chunk(std::int64_t row, const Sums<T>& part, std::int64_t i, T* a, const T* chunk_a, T* b,
                   const T* chunk_b) {
        const T old = totals_.shift[row], other = part.shift[i], shift = old > other ? old : other;
        const T d = old - shift, d_part = other - shift, f = std::exp(d), f_part = std::exp(d_part);
        totals_.zothers[row] = f * (totals_.zothers[row] + d * totals_.others[row]) +
                               f_part * (part.zothers[i] + d_part * part.others[i]);
        totals_.others[row] = f * totals_.others[row] + f_part * part.others[i];
        totals_.shift[row] = shift;
        if (details_) {
            totals_.squares[row] = f * f * totals_.squares[row] + f_part * f_part * part.squares[i];
            totals_.logits[row] += part.logits[i];
            if (part.rival[i] > totals_.rival[row]) totals_.rival[row] = part.rival[i];
        }
        for (std::int64_t k = 0; b && k < p_.width; ++k)
            b[k] = f * (b[k] + d * a[k]) + f_part * (chunk_b[k] + d_part * chunk_a[k]);
        for (std::int64_t k = 0; a && k < p_.width; ++k) a[k] = f * a[k] + f_part * chunk_a[k];
    }

    // The results of sparse_divergence for one row: the sum of the tail, and the mean of W over the tail.
    void finish_tail(std::int64_t row, std::int64_t token, T* a) const {
        const T tail = totals_.others[row], tiny = std::numeric_limits<T>::min();
        T* stats = at_row<T>(p_.stats, token, kSparseStats);
        stats[kShift] = totals_.shift[row], stats[kOthers] = tail;
        // Where the teacher names every entry there is no tail. A factor divided by `tiny` would overflow, and 0 times
        // infinity is NaN.
        const T scale = tail < tiny ? T(0) : (head_.capped ? T(1) : head_.factor) / tail;
        for (std::int64_t k = 0; a && k < p_.width; ++k) a[k] *= scale;
    }

    // The results of linear_logprobs for one row. `finish` in fastalign/ops/head/epilogue.py is the definition.
    void finish(std::int64_t row, std::int64_t token, T* a, T* b) const {
        const T others = totals_.others[row], z_y = target_logits_[row], shifted = z_y - totals_.shift[row];
        const T target = std::exp(shifted), total = others + target, slope = head_.slope_at(z_y);
        const T bounded = shifted < static_cast<T>(kStart) ? static_cast<T>(kStart) : shifted;
        // log1p keeps the digits of a log-prob near 0. Far below the maximum exp(shift - z_y) would overflow.
        static_cast<T*>(p_.logprobs)[token] =
            shifted > -30 ? -std::log1p(others * std::exp(-shifted)) : shifted - std::log(total);
        const T mean = entropy_ ? (totals_.zothers[row] + target * bounded) / total : T(0);
        if (entropy_) static_cast<T*>(p_.entropy)[token] = std::log(total) - mean;
        T* stats = static_cast<T*>(p_.stats) + token * kStats;
        stats[kShift] = totals_.shift[row], stats[kOthers] = others, stats[kTarget] = target, stats[kSlope] = slope;
        stats[kMean] = mean;
        if (details_) {
            T* details = static_cast<T*>(p_.details) + token * 3;
            details[0] = totals_.logits[row] / static_cast<T>(p_.vocab);
            details[1] = std::log(totals_.squares[row] + target * target) - 2 * std::log(total);
            details[2] = z_y > totals_.rival[row];
        }
        if (!a) return;
        const In* w = static_cast<const In*>(p_.weight) + p_.targets[token] * p_.weight_stride;
        const T constant = head_.capped ? T(1) : head_.factor;  // the constant slope, which the tiles leave out
        const T own = others / total * slope, rest = constant / total;
        const T own_entropy = target * slope * (bounded - mean) / total;
        for (std::int64_t k = 0; b && k < p_.width; ++k)
            b[k] = rest * (mean * a[k] - b[k]) - own_entropy * static_cast<T>(widen(w[k]));
        for (std::int64_t k = 0; k < p_.width; ++k) a[k] = own * static_cast<T>(widen(w[k])) - rest * a[k];
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
