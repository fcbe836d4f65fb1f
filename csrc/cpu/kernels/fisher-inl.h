#pragma once

// The exact per-sequence diagonal of a linear layer's Fisher information, F += sum_s (G_s' X_s)^2.
//
// A tile of F stays in the cache over all sequences. The product of a sequence is squared in the registers that hold
// it, so the gradient of a sequence is never written to memory. Exception: of a sequence longer than `depth`, one tile
// of its gradient is. Every entry of F belongs to one tile and gets its sequences in order, so any number of threads
// gives the same bits.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <type_traits>

#include "cpu/base/pool.h"
#include "cpu/base/problem.h"
#include "cpu/base/workspace.h"
#include "cpu/tiles/products-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

template <typename T, typename In>
class FisherPass {
    using S = Shape<T>;
    static constexpr std::int64_t most_rows = 192, most_panels = 8;  // of a tile, which fits L2 with its operands
    const FisherProblem& p_;
    const std::int64_t row_tiles_, rows_, column_tiles_, columns_, depth_;
    std::atomic<std::int64_t> dealt_{0};

    // The distance from one panel to the next. It is not a power of two, because such panels would evict each other
    // from the cache.
    std::int64_t apart(std::int64_t width) const { return depth_ * width + 64 / sizeof(T); }

    struct Scratch {
        T *fisher, *partial;  // (panels, rows, panel)
        T* input;             // (panels, depth, panel), a panel begins every `apart` entries
        T* grads;             // (rows / height, depth, height), likewise
        Scratch(Carver& c, const FisherPass& pass)
            : fisher(c.take<T>(pass.rows_ * pass.columns_)), partial(c.take<T>(pass.rows_ * pass.columns_)),
              input(c.take<T>(pass.columns_ / S::panel * pass.apart(S::panel))),
              grads(c.take<T>(pass.rows_ / S::height * pass.apart(S::height))) {}
    };

    static std::int64_t even_share(std::int64_t whole, std::int64_t parts, std::int64_t multiple) {
        return ceil_div(ceil_div(whole, parts), multiple) * multiple;
    }

    static std::int64_t longest(const FisherProblem& p) {
        std::int64_t length = 1;
        for (std::int64_t q = 0; q < p.sequences; ++q) length = std::max(length, p.offsets[q + 1] - p.offsets[q]);
        return length;
    }

    // Packs `count` columns of `depth` rows as panels (count / width, depth, width), with zeros after the last column.
    template <std::int64_t width>
    void pack(const In* from, std::int64_t stride, std::int64_t count, std::int64_t depth, T* out) const {
        const std::int64_t apart = this->apart(width);
        for (std::int64_t t = 0; t < depth; ++t, from += stride, out += width) {
            std::int64_t j = 0;
            T* to = out;
            for (; j + width <= count; j += width, to += apart) {
                if constexpr (std::is_same_v<In, T>) std::memcpy(to, from + j, width * sizeof(T));  // whole vectors
                else widen_row(from + j, to, width);
            }
            if (j == count) continue;
            for (std::int64_t x = count - j; x < width; ++x) to[x] = 0;
            widen_row(from + j, to, count - j);
        }
    }

    // Prefetches a row of the next tokens while the present tokens are multiplied. Hardware does not prefetch such
    // strides.
    static void ask(const void* from, std::int64_t at, std::int64_t count) {
        const char* line = reinterpret_cast<const char*>(static_cast<const In*>(from) + at);
        for (const char* end = line + count * sizeof(In); line < end; line += 64) __builtin_prefetch(line, 0, 2);
        __builtin_prefetch(static_cast<const In*>(from) + at + count - 1, 0, 2);
    }

    // partial (height, panel) = G' X for the first tokens of a sequence, else +=. With the last tokens of a sequence it
    // computes fisher += (partial + G' X)^2 instead.
    static void product(const T* grads, const T* input, std::int64_t depth, T* partial, T* fisher, bool first,
                        bool last) {
        constexpr int vectors = S::vectors, L = lanes<T>;
        Vec<T> sum[S::height][vectors];
        for (int i = 0; i < S::height; ++i)
            for (int j = 0; j < vectors; ++j) sum[i][j] = first ? Vec<T>{} : load(partial + i * S::panel + j * L);
        for (std::int64_t t = 0; t < depth; ++t, grads += S::height, input += S::panel) {
            Vec<T> b[vectors];
            for (int j = 0; j < vectors; ++j) b[j] = load(input + j * L);
#pragma GCC unroll 8
            for (int i = 0; i < S::height; ++i)
                for (int j = 0; j < vectors; ++j) sum[i][j] += grads[i] * b[j];
        }
        for (int i = 0; i < S::height; ++i)
            for (int j = 0; j < vectors; ++j) {
                T* f = fisher + i * S::panel + j * L;
                if (last) store(f, load(f) + sum[i][j] * sum[i][j]);
                else store(partial + i * S::panel + j * L, sum[i][j]);
            }
    }

    // The products of tokens t to t + depth - 1 on one tile. Meanwhile the rows of the next tokens are prefetched, one
    // by one.
    void chunk(std::int64_t t, std::int64_t depth, std::int64_t row, std::int64_t rows, std::int64_t column,
               std::int64_t columns, bool first, bool last, const Scratch& s) const {
        pack<S::panel>(static_cast<const In*>(p_.input) + t * p_.input_stride + column, p_.input_stride, columns, depth,
                       s.input);
        pack<S::height>(static_cast<const In*>(p_.grad_output) + t * p_.grad_stride + row, p_.grad_stride, rows, depth,
                        s.grads);
        const std::int64_t products = ceil_div(columns, S::panel) * ceil_div(rows, S::height);
        const std::int64_t ahead = 2 * smaller(depth, p_.offsets[p_.sequences] - t - depth);  // rows of both operands
        std::int64_t asked = 0, due = 0;
        for (std::int64_t j = 0; j < columns; j += S::panel)
            for (std::int64_t i = 0; i < rows; i += S::height) {
                for (due += ahead; due > 0; due -= products, ++asked) {
                    const std::int64_t token = t + depth + asked / 2;
                    if (asked % 2 == 0) ask(p_.input, token * p_.input_stride + column, columns);
                    else ask(p_.grad_output, token * p_.grad_stride + row, rows);
                }
                const std::int64_t at = j * rows_ + i * S::panel;
                product(s.grads + i / S::height * apart(S::height), s.input + j / S::panel * apart(S::panel), depth,
                        s.partial + at, s.fisher + at, first, last);
            }
    }

    void tile(std::int64_t row, std::int64_t column, const Scratch& s) {
        const std::int64_t rows = smaller(rows_, p_.out - row), columns = smaller(columns_, p_.in - column);
        copy(row, column, rows, columns, s.fisher, true);
        for (std::int64_t q = 0; q < p_.sequences; ++q)
            for (std::int64_t t = p_.offsets[q]; t < p_.offsets[q + 1]; t += depth_) {
                const std::int64_t depth = smaller(depth_, p_.offsets[q + 1] - t);
                const bool first = t == p_.offsets[q], last = t + depth == p_.offsets[q + 1];
                chunk(t, depth, row, rows, column, columns, first, last, s);
            }
        copy(row, column, rows, columns, s.fisher, false);
    }

    // Copies from F into its tile (`in`), or back.
    void copy(std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns, T* tile, bool in) {
        for (std::int64_t j = 0; j < columns; j += S::panel)
            for (std::int64_t i = 0; i < rows; ++i) {
                T* f = static_cast<T*>(p_.fisher) + (row + i) * p_.fisher_stride + column + j;
                T* t = tile + j * rows_ + i * S::panel;
                const std::int64_t count = smaller(S::panel, columns - j);
                if (count == S::panel) std::memcpy(in ? t : f, in ? f : t, S::panel * sizeof(T));  // whole vectors
                else std::memcpy(in ? t : f, in ? f : t, count * sizeof(T));
            }
    }

public:
    explicit FisherPass(const FisherProblem& p)
        : p_(p), row_tiles_(ceil_div(p.out, most_rows)), rows_(even_share(p.out, row_tiles_, S::height)),
          column_tiles_(ceil_div(p.in, most_panels * S::panel)), columns_(even_share(p.in, column_tiles_, S::panel)),
          depth_(smaller(S::depth, longest(p))) {}

    void run(const Pool& pool) {
        Carver counter(nullptr);
        Scratch(counter, *this);
        const std::int64_t items = row_tiles_ * column_tiles_;
        const Pool fewer{static_cast<int>(smaller(pool.workers, items)), pool.parallel_for};
        Workspace space(fewer.workers * counter.used());
        fewer.run([&](int worker) {
            Carver carver(space.data() + worker * counter.used());
            const Scratch scratch(carver, *this);
            for (std::int64_t item; (item = dealt_.fetch_add(1, std::memory_order_relaxed)) < items;)
                tile(item / column_tiles_ * rows_, item % column_tiles_ * columns_, scratch);
        });
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
