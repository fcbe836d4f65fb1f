#pragma once

// linear_divergence. The beginning of fastalign/ops/head/divergence_tiles.py explains the formulas, and why three
// products are enough for every divergence. The rows are processed in groups. The logits of both sides are held in
// memory for one group, which goes through three sweeps over (vocabulary chunk, block of rows):
//
//     project   computes both products into the held tiles, and the logsumexp of both sides
//     measure   computes the terms of the divergence and of K, and replaces the tiles by what the gradient is made of
//     fold      computes the gradient in the student's logits and multiplies it by the weight, and for a trainable head
//               also by the hidden states
//
// Sums have one order for any number of threads. What a chunk adds to a row is computed separately and added in the
// order of the vocabulary, as in linear_logprobs-inl.h. What a row adds to a chunk of a trainable head is added in the
// order of the rows, because there one worker takes a whole chunk.

#include "cpu/kernels/divergence_terms-inl.h"
#include "cpu/kernels/linear_logprobs-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

template <typename T, typename In>
class DivergencePass {
    using S = Shape<T>;
    enum { kStudentTop, kStudentLog, kTeacherTop, kTeacherLog, kMoment, kDivergenceStats };
    const DivergenceProblem& p_;
    const Head<T> head_, teacher_head_;
    const bool trainable_, gradients_;
    const std::int64_t padded_width_, chunk_, chunks_, tiles_;
    std::int64_t group_rows_, block_rows_, blocks_;  // rows per group, rows per block (the last may have fewer), blocks
    std::int64_t first_ = 0;                         // the first row of the present group
    T *held_[2], *values_, *stats_;                 // stats_ is (kDivergenceStats, rows of a group)

    struct Scratch {
        Tiles<T, In> student, teacher;
        T *a, *sums, *moments, *coefficients;
    };

    Scratch carve(Carver& c) const {
        const TileProducts needs{true, p_.grad_hidden != nullptr, p_.d_weight != nullptr};
        Scratch s{Tiles<T, In>(c, block_rows_, p_.student.width, needs),
                  Tiles<T, In>(c, block_rows_, p_.teacher.width, {true, false, false}), {}, {}, {}, {}};
        s.a = c.take<T>(p_.grad_hidden ? block_rows_ * padded_width_ : 0);
        s.sums = c.take<T>(2 * block_rows_), s.moments = c.take<T>(2 * block_rows_);
        s.coefficients = c.take<T>(block_rows_);
        return s;
    }
    void carve_group(Carver& c) {
        for (T*& side : held_) side = c.take<T>(group_rows_ * tiles_ * S::tile);
        values_ = c.take<T>(blocks_ * block_rows_);
        stats_ = c.take<T>(kDivergenceStats * blocks_ * block_rows_);
    }

public:
    explicit DivergencePass(const DivergenceProblem& p)
        : p_(p), head_(p.student.logit_scale, p.student.softcap, p.student.temperature),
          teacher_head_(p.teacher.logit_scale, p.teacher.softcap, p.teacher.temperature),
          trainable_(p.d_weight || p.d_bias), gradients_(p.grad_hidden || trainable_),
          padded_width_(ceil_div(p.student.width, S::panel) * S::panel), chunk_(kChunkTiles * S::tile),
          chunks_(ceil_div(p.student.vocab, chunk_)), tiles_(ceil_div(p.student.vocab, S::tile)) {}

    void run(Pool pool) {
        if (p_.student.scored == 0 || tiles_ == 0) return;  // nothing to compute, and both are divided by
        const std::int64_t held = p_.budget / (2 * tiles_ * S::tile * static_cast<std::int64_t>(sizeof(T)));
        const std::int64_t needed = ceil_div(p_.student.scored, S::panel);
        const std::int64_t most = held < S::panel ? 1 : smaller(held / S::panel, needed);  // panels per group
        const std::int64_t panels = ceil_div(needed, ceil_div(needed, most));              // the same in all groups
        group_rows_ = panels * S::panel;
        blocks_ = ceil_div(panels, kMostRows / S::panel);
        block_rows_ = ceil_div(panels, blocks_) * S::panel;
        blocks_ = ceil_div(group_rows_, block_rows_);
        pool.workers = static_cast<int>(smaller(pool.workers, chunks_ * blocks_));
        Carver size(nullptr), group_size(nullptr);
        carve(size);
        carve_group(group_size);
        Workspace workspace(pool.workers * size.used() + group_size.used());
        Carver group(workspace.data() + pool.workers * size.used());
        carve_group(group);
        for (first_ = 0; first_ < p_.student.scored; first_ += group_rows_) {
            const auto run_sweep = [&](Step scan, Step merge, bool whole_chunks) {
                sweep(pool, workspace.data(), size.used(), scan, merge, whole_chunks);
            };
            run_sweep(&DivergencePass::project, &DivergencePass::merge_logsumexp, false);
            run_sweep(&DivergencePass::measure, &DivergencePass::merge_terms, false);
            if (gradients_) run_sweep(&DivergencePass::fold, &DivergencePass::merge_gradient, trainable_);
        }
    }

private:
    using Step = void (DivergencePass::*)(std::int64_t index, std::int64_t chunk, Scratch&);

    // Runs `scan` for every chunk and block of the group, each followed by `merge`, in the order of the vocabulary.
    void sweep(const Pool& pool, char* data, std::size_t size, Step scan, Step merge, bool whole_chunks) {
        const std::int64_t blocks = ceil_div(smaller(group_rows_, p_.student.scored - first_), block_rows_);
        const std::int64_t together = whole_chunks ? blocks : 1;
        OrderedItems items(chunks_ * blocks / together, blocks);
        pool.run([&](int worker) {
            Carver own(data + worker * size);
            Scratch scratch = carve(own);
            for (std::int64_t item; items.next(item);)
                for (std::int64_t step = item * together; step < (item + 1) * together; ++step) {
                    const std::int64_t chunk = step / blocks, index = step % blocks;
                    (this->*scan)(index, chunk, scratch);
                    items.wait(index, chunk);
                    (this->*merge)(index, chunk, scratch);
                    items.done(index, chunk);
                }
            scratch.student.release();
        });
    }

    RowBlock<In> rows(const HeadProblem& side, std::int64_t index) const {
        const std::int64_t first = first_ + index * block_rows_, end = smaller(first_ + group_rows_, side.scored);
        return {side, first, smaller(block_rows_, end - first)};
    }
    std::int64_t panels(std::int64_t index) const { return ceil_div(rows(p_.student, index).count, S::panel); }
    T* held(int side, std::int64_t index, std::int64_t v) const {
        return held_[side] + (index * block_rows_ * tiles_ + v / S::tile * panels(index) * S::panel) * S::tile;
    }
    T* stat(int which, std::int64_t index) const { return stats_ + (which * blocks_ + index) * block_rows_; }
    void clear(T* at, T value) const {
        for (std::int64_t i = 0; i < block_rows_; ++i) at[i] = value;
    }

    void project(std::int64_t index, std::int64_t chunk, Scratch& s) {
        for (const int side : {0, 1}) {
            const HeadProblem& p = side ? p_.teacher : p_.student;
            Tiles<T, In>& tiles = side ? s.teacher : s.student;
            const Head<T>& head = side ? teacher_head_ : head_;
            T *top = s.moments + side * block_rows_, *sum = s.sums + side * block_rows_;
            clear(top, static_cast<T>(kStart)), clear(sum, 0);
            tiles.take_rows(rows(p, index));
            const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p.vocab), count = panels(index);
            for (std::int64_t v = begin; v < end; v += S::tile) {
                const WeightTile<In> weight(p, v, smaller(S::tile, end - v));
                T* z = held(side, index, v);
                tiles.logits(weight, 0, count, z);
                const T* bias = p.bias ? static_cast<const T*>(p.bias) + v : nullptr;
                for (std::int64_t i = 0; i < count; ++i)
                    absorb_sum(z + i * S::panel * S::tile, weight.size, bias, head, top + i * S::panel, sum + i * S::panel);
            }
        }
    }

    void merge_logsumexp(std::int64_t index, std::int64_t chunk, Scratch& s) {
        for (const int side : {0, 1}) {
            T *top = stat(side ? kTeacherTop : kStudentTop, index), *sum = stat(side ? kTeacherLog : kStudentLog, index);
            const T *part_top = s.moments + side * block_rows_, *part = s.sums + side * block_rows_;
            for (std::int64_t i = 0; i < block_rows_; ++i) {
                const T old = chunk ? top[i] : static_cast<T>(kStart), total = chunk ? sum[i] : T(0);
                top[i] = old > part_top[i] ? old : part_top[i];
                sum[i] = total * std::exp(old - top[i]) + part[i] * std::exp(part_top[i] - top[i]);
                if (chunk == chunks_ - 1) sum[i] = std::log(sum[i]);
            }
        }
    }

    void measure(std::int64_t index, std::int64_t chunk, Scratch& s) {
        clear(s.sums, 0), clear(s.moments, 0);
        const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p_.student.vocab);
        for (std::int64_t v = begin; v < end; v += S::tile)
            for (std::int64_t i = 0; i < panels(index); ++i) {
                const std::int64_t row = i * S::panel, at = row * S::tile;
                const DivergenceRows<T> panel{stat(kStudentTop, index) + row, stat(kStudentLog, index) + row,
                                              stat(kTeacherTop, index) + row, stat(kTeacherLog, index) + row,
                                              s.sums + row, s.moments + row};
                add_terms(p_.kind, held(0, index, v) + at, held(1, index, v) + at, smaller(S::tile, end - v), panel,
                          static_cast<T>(p_.beta), head_, gradients_);
            }
    }

    void merge_terms(std::int64_t index, std::int64_t chunk, Scratch& s) {
        T *values = values_ + index * block_rows_, *moments = stat(kMoment, index);
        for (std::int64_t i = 0; i < block_rows_; ++i) {
            values[i] = s.sums[i] + (chunk ? values[i] : T(0));
            moments[i] = s.moments[i] + (chunk ? moments[i] : T(0));
        }
        if (chunk < chunks_ - 1) return;
        const RowBlock<In> block = rows(p_.student, index);
        for (std::int64_t i = 0; i < block.count; ++i) {
            const std::int64_t token = block.token(i);
            // Only entries with probability 0 on one side, whose logit is held as kStart, make a value that large.
            static_cast<T*>(p_.values)[token] = values[i] > T(1e9) ? std::numeric_limits<T>::infinity() : values[i];
            for (int k = 0; k < kDivergenceStats; ++k)
                static_cast<T*>(p_.stats)[token * kDivergenceStats + k] = stat(k, index)[i];
        }
    }

    void fold(std::int64_t index, std::int64_t chunk, Scratch& s) {
        const std::int64_t begin = chunk * chunk_, end = smaller(begin + chunk_, p_.student.vocab);
        const T scale = (p_.kind == Divergence::jsd ? T(1 - p_.beta) : T(1)) * (head_.capped ? T(1) : head_.factor);
        if (trainable_) take_coefficients(rows(p_.student, index), s);
        for (std::int64_t v = begin; v < end; v += S::tile) {
            const WeightTile<In> weight(p_.student, v, smaller(S::tile, end - v));
            T *a = held(0, index, v), *b = held(1, index, v);
            for (std::int64_t i = 0; i < panels(index); ++i)
                differentiate_divergence(p_.kind, a + i * S::panel * S::tile, b + i * S::panel * S::tile, weight.size,
                                         stat(kMoment, index) + i * S::panel, scale);
            if (p_.grad_hidden) s.student.fold(a, panels(index), weight, s.a, v == begin);
            if (trainable_) add_to_head(a, panels(index), weight, s);
        }
    }

    void take_coefficients(const RowBlock<In>& block, Scratch& s) const {
        for (std::int64_t i = 0; i < block_rows_; ++i)  // 0 for the padded rows of the last panel
            s.coefficients[i] = i < block.count ? static_cast<const T*>(p_.coefficients)[block.token(i)] : T(0);
        if (p_.d_weight) s.student.take_rows_for_outer(block);
    }
    void add_to_head(T* a, std::int64_t count, const WeightTile<In>& weight, Scratch& s) const {
        for (std::int64_t i = 0; i < count; ++i)
            scale_tokens(a + i * S::panel * S::tile, weight.size, s.coefficients + i * S::panel);
        T* d_weight = at_row<T>(p_.d_weight, weight.begin, padded_width_);
        T* d_bias = at_row<T>(p_.d_bias, weight.begin, lanes<T>);
        if (d_weight) s.student.outer(a, count, weight.size, d_weight);
        if (d_bias) add_bias(a, count, weight.size, d_bias);
    }

    void merge_gradient(std::int64_t index, std::int64_t chunk, Scratch& s) {
        if (!p_.grad_hidden) return;
        const RowBlock<In> block = rows(p_.student, index);
        for (std::int64_t i = 0; i < block.count; ++i) {
            T* to = at_row<T>(p_.grad_hidden, block.token(i), p_.student.width);
            const T* from = s.a + i * padded_width_;
            for (std::int64_t k = 0; k < p_.student.width; ++k) to[k] = from[k] + (chunk ? to[k] : T(0));
        }
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
