#pragma once

// The two passes of linear_logprobs. Work is dealt out as (vocabulary chunk, block of rows); what a chunk adds to a
// row is computed apart from all other chunks, by whichever worker, and added in the order of the vocabulary. So a
// token's result depends neither on the batch nor on the number of threads.

#include "pool.h"
#include "softmax.h"
#include "tiles.h"

namespace fastalign {
namespace FASTALIGN_ISA {

constexpr std::int64_t kChunkTiles = 8;             // tiles of one chunk of the forward pass
constexpr std::int64_t kScratchBudget = 24u << 20;  // bytes, all workers together
constexpr std::int64_t kWeightBudget = 4u << 20;    // bytes of the weight's gradient that a worker holds
constexpr std::int64_t kMostRows = 192;             // beyond, the tile of logits falls out of L2
enum Stat { kShift, kOthers, kTarget, kSlope, kMean, kStats };

template <typename T>
T* at_row(void* base, std::int64_t row, std::int64_t width) {
    return base ? static_cast<T*>(base) + row * width : nullptr;
}

// Where each row's target lies in the tile, or -1; empty rows have none.
template <typename T, typename In>
void target_columns(const RowBlock<In>& block, const WeightTile<In>& weight, std::int64_t* out) {
    for (std::int64_t i = 0; i < ceil_div(block.count, Shape<T>::panel) * Shape<T>::panel; ++i) {
        const std::int64_t at = i < block.count ? block.target(i) - weight.begin : -1;
        out[i] = at >= 0 && at < weight.size ? at : -1;
    }
}

// ---- forward ------------------------------------------------------------------------------------------------------

template <typename T, typename In>
class ForwardPass {
    using S = Shape<T>;
    const ForwardProblem& p_;
    const Head<T> head_;
    const bool gradients_, entropy_;
    const std::int64_t padded_width_, chunk_, chunks_, tiles_;
    std::int64_t block_rows_, blocks_;
    Sums<T> totals_{};

    struct Scratch {
        Tiles<T, In> tiles;
        T *z, *zweighted, *a, *b, *shrink, *moved;
        std::int64_t* columns;
        Sums<T> sums;
    };

    Scratch carve(Carver& c, std::int64_t rows) const {
        const std::int64_t sheet = gradients_ ? rows * padded_width_ : 0, grad_entropy = gradients_ && entropy_;
        Scratch s{Tiles<T, In>(c, rows, p_.width, {true, gradients_, false}), {}, {}, {}, {}, {}, {}, {}, {}};
        s.z = c.take<T>(rows * S::tile);
        s.zweighted = c.take<T>(grad_entropy ? rows * S::tile : 0);
        s.a = c.take<T>(sheet);
        s.b = c.take<T>(grad_entropy ? sheet : 0);
        s.shrink = c.take<T>(rows), s.moved = c.take<T>(rows);
        s.columns = c.take<std::int64_t>(rows);
        s.sums = take_sums(c, rows);
        return s;
    }
    static Sums<T> take_sums(Carver& c, std::int64_t rows) {
        T* shift = c.take<T>(rows);
        T* others = c.take<T>(rows);
        T* zothers = c.take<T>(rows);
        return {shift, others, zothers, c.take<T>(rows)};
    }

public:
    explicit ForwardPass(const ForwardProblem& p)
        : p_(p), head_(p.logit_scale, p.softcap, p.temperature), gradients_(p.grad_logprobs), entropy_(p.entropy),
          padded_width_(ceil_div(p.width, S::panel) * S::panel), chunk_(kChunkTiles * S::tile),
          chunks_(ceil_div(p.vocab, chunk_)), tiles_(ceil_div(p.vocab, S::tile)) {}

    void run(Pool pool) {
        // Hundreds of megabytes that nobody has touched yet: faults page by page can cost as much as a product.
        if (p_.cache) prefer_huge_pages(p_.cache, p_.cache_rows * p_.vocab * sizeof(In));
        const std::int64_t sheets = gradients_ ? 1 + entropy_ : 0;
        const std::int64_t row_bytes = sizeof(T) * (p_.width + sheets * padded_width_ + (1 + entropy_) * S::tile + 8);
        block_rows_ = rows_per_block<T>(p_.scored, pool.workers, row_bytes, kMostRows, kScratchBudget);
        blocks_ = ceil_div(p_.scored, block_rows_);
        const std::int64_t rows = blocks_ * block_rows_;
        pool.workers = static_cast<int>(smaller(pool.workers, chunks_ * blocks_));
        Carver size(nullptr);
        carve(size, block_rows_);
        Carver totals_size(nullptr);
        take_sums(totals_size, rows);
        Workspace workspace(pool.workers * size.used() + totals_size.used());
        Carver totals(workspace.data() + pool.workers * size.used());
        totals_ = take_sums(totals, rows);
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
    // One chunk of the vocabulary, for one block of rows, into the worker's own sums.
    void scan(const RowBlock<In>& block, std::int64_t chunk, Scratch& s) const {
        const std::int64_t panels = ceil_div(block.count, S::panel);
        const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p_.vocab);
        s.tiles.take_rows(block);
        for (std::int64_t i = 0; i < panels * S::panel; ++i) {
            s.sums.shift[i] = static_cast<T>(kStart);
            s.sums.others[i] = s.sums.zothers[i] = s.sums.target_logit[i] = 0;
        }
        for (std::int64_t v = begin; v < end; v += S::tile) {
            const WeightTile<In> weight(p_, v, smaller(S::tile, end - v));
            s.tiles.logits(weight, 0, panels, s.z);
            target_columns<T>(block, weight, s.columns);
            for (std::int64_t p = 0; p < panels; ++p) absorb_panel(block, p, v, weight.size, v == begin, s);
            if (gradients_) s.tiles.fold(s.z, panels, weight, s.a, v == begin);
            if (gradients_ && entropy_) s.tiles.fold(s.zweighted, panels, weight, s.b, v == begin);
        }
    }

    void absorb_panel(const RowBlock<In>& block, std::int64_t p, std::int64_t v, std::int64_t tile, bool first,
                      Scratch& s) const {
        const std::int64_t row = p * S::panel;
        T* z = s.z + row * S::tile;
        const Sums<T> sums{s.sums.shift + row, s.sums.others + row, s.sums.zothers + row, s.sums.target_logit + row};
        const T* bias = p_.bias ? static_cast<const T*>(p_.bias) + v : nullptr;
        T* zweighted = gradients_ && entropy_ ? s.zweighted + row * S::tile : nullptr;
        const bool moved = absorb(z, tile, bias, head_, s.columns + row, sums, entropy_, gradients_ || p_.cache,
                                  zweighted, s.shrink + row, s.moved + row);
        if (moved && !first && gradients_) rescale(row, s);
        if (block.first + row < p_.cache_rows) keep(block.first / S::panel + p, v, tile, z, sums.shift);
    }

    void rescale(std::int64_t row, Scratch& s) const {
        for (std::int64_t i = row; i < row + S::panel; ++i) {
            if (s.moved[i] == 0) continue;
            T *a = s.a + i * padded_width_, *b = s.b + i * padded_width_;
            if (entropy_)
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

    // Adds a chunk to the totals of its rows; after the last chunk, the results.
    void merge(const RowBlock<In>& block, std::int64_t chunk, Scratch& s) {
        const std::int64_t begin = chunk * chunk_;
        for (std::int64_t i = 0; i < block.count; ++i) {
            const std::int64_t row = block.first + i, token = block.token(i), y = p_.targets[token];
            T *a = at_row<T>(p_.grad_logprobs, token, p_.width), *b = at_row<T>(p_.grad_entropy, token, p_.width);
            const T *chunk_a = s.a + i * padded_width_, *chunk_b = s.b + i * padded_width_;
            if (chunk == 0) {
                totals_.shift[row] = s.sums.shift[i], totals_.others[row] = s.sums.others[i];
                totals_.zothers[row] = s.sums.zothers[i];
                for (std::int64_t k = 0; gradients_ && k < p_.width; ++k) a[k] = chunk_a[k];
                for (std::int64_t k = 0; b && k < p_.width; ++k) b[k] = chunk_b[k];
            } else {
                add_chunk(row, s.sums, i, a, chunk_a, b, chunk_b);
            }
            if (y >= begin && y < begin + chunk_) totals_.target_logit[row] = s.sums.target_logit[i];
            if (chunk == chunks_ - 1) finish(row, token, y, a, b);
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
        for (std::int64_t k = 0; b && k < p_.width; ++k)
            b[k] = f * (b[k] + d * a[k]) + f_part * (chunk_b[k] + d_part * chunk_a[k]);
        for (std::int64_t k = 0; a && k < p_.width; ++k) a[k] = f * a[k] + f_part * chunk_a[k];
    }

    // `_finish` of fastalign/ops/tiles.py, for one row.
    void finish(std::int64_t row, std::int64_t token, std::int64_t y, T* a, T* b) const {
        const T others = totals_.others[row], z_y = totals_.target_logit[row], shifted = z_y - totals_.shift[row];
        const T target = std::exp(shifted), total = others + target, slope = head_.slope_at(z_y);
        const T bounded = shifted < static_cast<T>(kStart) ? static_cast<T>(kStart) : shifted;
        // log1p keeps the digits of a log-prob near 0; far below the maximum exp(shift - z_y) would overflow
        static_cast<T*>(p_.logprobs)[token] =
            shifted > -30 ? -std::log1p(others * std::exp(-shifted)) : shifted - std::log(total);
        const T mean = entropy_ ? (totals_.zothers[row] + target * bounded) / total : T(0);
        if (entropy_) static_cast<T*>(p_.entropy)[token] = std::log(total) - mean;
        T* stats = static_cast<T*>(p_.stats) + token * kStats;
        stats[kShift] = totals_.shift[row], stats[kOthers] = others, stats[kTarget] = target, stats[kSlope] = slope;
        stats[kMean] = mean;
        if (!a) return;
        const In* w = static_cast<const In*>(p_.weight) + y * p_.weight_stride;
        const T constant = head_.capped ? T(1) : head_.factor;  // the slope that was left out of the tiles
        const T own = others / total * slope, rest = constant / total;
        const T own_entropy = target * slope * (bounded - mean) / total;
        for (std::int64_t k = 0; b && k < p_.width; ++k)
            b[k] = rest * (mean * a[k] - b[k]) - own_entropy * static_cast<T>(widen(w[k]));
        for (std::int64_t k = 0; k < p_.width; ++k) a[k] = own * static_cast<T>(widen(w[k])) - rest * a[k];
    }
};

// ---- backward -----------------------------------------------------------------------------------------------------

// The gradient of a trainable head. An item is a chunk of the vocabulary: one worker takes all rows through it in
// order, so that the weight's gradient has one owner and one order of summation.
template <typename T, typename In>
class BackwardPass {
    using S = Shape<T>;
    const BackwardProblem& p_;
    const Head<T> head_;
    const std::int64_t padded_width_, tiles_;
    std::int64_t chunk_, chunks_, block_rows_, blocks_;

    struct Scratch {
        Tiles<T, In> tiles;
        T *z, *a, *d_weight, *d_bias;
        std::int64_t* columns;
        Coefficients<T> c;
    };

    Scratch carve(Carver& c, std::int64_t rows) const {
        Scratch s{Tiles<T, In>(c, rows, p_.width, {recomputes(), p_.d_hidden != nullptr, p_.d_weight != nullptr}), {}, {}, {}, {}, {}, {}};
        s.z = c.take<T>(rows * S::tile);
        s.a = c.take<T>(p_.d_hidden ? rows * padded_width_ : 0);
        s.d_weight = c.take<T>(p_.d_weight ? chunk_ * padded_width_ : 0);
        s.d_bias = c.take<T>(p_.d_bias ? chunk_ * lanes<T> : 0);
        s.columns = c.take<std::int64_t>(rows);
        s.c.shift = c.take<T>(rows), s.c.mean = c.take<T>(rows), s.c.logprob = c.take<T>(rows);
        s.c.entropy = c.take<T>(rows), s.c.target = c.take<T>(rows);
        return s;
    }

public:
    explicit BackwardPass(const BackwardProblem& p)
        : p_(p), head_(p.logit_scale, p.softcap, p.temperature),
          padded_width_(ceil_div(p.width, S::panel) * S::panel), tiles_(ceil_div(p.vocab, S::tile)) {
        // By the width alone: neither batch nor threads may change the order of summation.
        const std::int64_t fit = kWeightBudget / static_cast<std::int64_t>(S::tile * padded_width_ * sizeof(T));
        chunk_ = (fit < 1 ? 1 : smaller(fit, 4)) * S::tile;
        chunks_ = ceil_div(p.vocab, chunk_);
    }

    void run(Pool pool) {
        if (p_.d_weight) prefer_huge_pages(p_.d_weight, p_.vocab * p_.width * sizeof(In));
        pool.workers = static_cast<int>(smaller(pool.workers, chunks_));
        const std::int64_t sheets = recomputes() + (p_.d_hidden != nullptr) + (p_.d_weight != nullptr);
        const std::int64_t row_bytes = sizeof(T) * (sheets * padded_width_ + S::tile + 8);
        block_rows_ = rows_per_block<T>(p_.scored, pool.workers, row_bytes, kMostRows, kScratchBudget);
        blocks_ = ceil_div(p_.scored, block_rows_);
        Carver size(nullptr);
        carve(size, block_rows_);
        Workspace workspace(pool.workers * size.used());
        OrderedItems items(chunks_, blocks_);
        pool.run([&](int worker) {
            Carver own(workspace.data() + worker * size.used());
            Scratch scratch = carve(own, block_rows_);
            for (std::int64_t chunk; items.next(chunk);) run_chunk(chunk, items, scratch);
            scratch.tiles.release();
        });
    }

private:
    bool recomputes() const { return !p_.cache || p_.cache_rows < p_.scored; }

    void run_chunk(std::int64_t chunk, OrderedItems& items, Scratch& s) {
        const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p_.vocab);
        for (std::int64_t i = 0; p_.d_weight && i < (end - begin) * padded_width_; ++i) s.d_weight[i] = 0;
        for (std::int64_t i = 0; p_.d_bias && i < (end - begin) * lanes<T>; ++i) s.d_bias[i] = 0;
        for (std::int64_t b = 0; b < blocks_; ++b) {
            const RowBlock<In> block{p_, b * block_rows_, smaller(block_rows_, p_.scored - b * block_rows_)};
            const std::int64_t panels = ceil_div(block.count, S::panel);
            coefficients(block, s.c);
            if (recomputes()) s.tiles.take_rows(block);
            if (p_.d_weight) s.tiles.take_rows_for_outer(block);
            for (std::int64_t v = begin; v < end; v += S::tile) {
                const WeightTile<In> weight(p_, v, smaller(S::tile, end - v));
                gradient_tile(block, panels, weight, s);
                if (p_.d_hidden) s.tiles.fold(s.z, panels, weight, s.a, v == begin);
                if (p_.d_weight) s.tiles.outer(s.z, panels, weight.size, s.d_weight + (v - begin) * padded_width_);
                if (p_.d_bias) add_bias(panels, weight.size, s.z, s.d_bias + (v - begin) * lanes<T>);
            }
            if (!p_.d_hidden) continue;
            items.wait(b, chunk);
            add_hidden(block, s);
            items.done(b, chunk);
        }
        write_chunk(begin, end - begin, s);
    }

    // The gradient in u = h W' + b of one tile, (panels, tile, panel), into s.z.
    void gradient_tile(const RowBlock<In>& block, std::int64_t panels, const WeightTile<In>& weight, Scratch& s) {
        const std::int64_t first_panel = block.first / S::panel;
        std::int64_t kept = p_.cache ? p_.cache_rows / S::panel - first_panel : 0;
        kept = kept < 0 ? 0 : smaller(kept, panels);
        target_columns<T>(block, weight, s.columns);
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
            for (std::int64_t i = 0; i < S::panel; ++i)
                if (s.columns[row + i] >= 0) z[s.columns[row + i] * S::panel + i] = c.target[i];
        }
    }

    void from_cache(std::int64_t panel, const WeightTile<In>& weight, T* z, const Coefficients<T>& c) const {
        const In* cache = static_cast<const In*>(p_.cache) + (panel * p_.vocab + weight.begin) * S::panel;
        const T* then = static_cast<const T*>(p_.shifts) + (panel * tiles_ + weight.begin / S::tile) * S::panel;
        differentiate_kept(cache, z, weight.size, head_, c, then);
    }

    void coefficients(const RowBlock<In>& block, const Coefficients<T>& c) const {
        for (std::int64_t i = 0; i < ceil_div(block.count, S::panel) * S::panel; ++i) {
            c.shift[i] = -static_cast<T>(kStart);  // an empty row's exponentials are 0
            c.mean[i] = c.logprob[i] = c.entropy[i] = c.target[i] = 0;
            if (i >= block.count) continue;
            const std::int64_t token = block.token(i);
            const T* stats = static_cast<const T*>(p_.stats) + token * kStats;
            const T total = stats[kOthers] + stats[kTarget], g = static_cast<const T*>(p_.grad_logprobs)[token];
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

    // Per lane, over all panels of all blocks in order; the lanes are added last. So the block's size does not matter.
    void add_bias(std::int64_t panels, std::int64_t tile, const T* z, T* d_bias) const {
        for (std::int64_t p = 0; p < panels; ++p)
            for (std::int64_t t = 0; t < tile; ++t)
                for (int j = 0; j < S::vectors; ++j) {
                    T* sum = d_bias + t * lanes<T>;
                    store(sum, load(sum) + load(z + (p * S::tile + t) * S::panel + j * lanes<T>));
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
