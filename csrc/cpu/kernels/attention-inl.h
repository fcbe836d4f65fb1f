#pragma once

// Attention over the segments of a packed row. A query sees two runs of keys: the prefix of its segment, which lies in
// an earlier segment, and its segment up to itself.
//
// The tiles of a linear head (tiles-inl.h) compute the products, with queries in the role of hidden states and keys in
// the role of the vocabulary. So a tile of scores is (keys, queries), and its online softmax runs down vectors of
// queries, tile after tile (Milakov and Gimelshein, 2018; Dao et al., 2022). The backward pass recomputes the
// probabilities from the logarithms of their sums.
//
// Results have the same bits
//
// - whether or not the prefix is shared, because tiles are counted from the first key of the prefix
// - for any number of threads, because one worker computes a unit of work alone. In the forward pass the unit is one
//   query head of a block of queries, in the backward pass one key head of a group (a prompt and all its completions)

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/base/pool.h"
#include "cpu/tiles/tiles-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

template <typename T, typename In>
class AttentionPass {
    using S = Shape<T>;
    static constexpr std::int64_t P = S::panel, L = lanes<T>, block_rows = 128 / P * P;
    static_assert(block_rows > 0);
    // The score of a key that a query does not see. It is finite, because a query may see nothing of its first tiles,
    // and -inf minus -inf would be NaN.
    static constexpr T hidden_score = static_cast<T>(-1e30);

    struct Segment {
        std::int64_t begin, length, prefix_begin, prefix;
    };

    // The memory of one worker: for products of queries with keys and of output gradients with values, for a tile of
    // each, and for some numbers per query.
    struct Worker {
        Tiles<T, In> keys, values;
        T *scores, *slopes, *out, *most, *sum, *remains, *delta, *d_key, *d_value;
        In *joined_keys, *joined_values;

        Worker(Carver& c, const AttentionProblem& p, std::int64_t longest_group)
            : keys(c, block_rows, p.width, {true, p.grad.at != nullptr, p.grad.at != nullptr}),
              values(c, block_rows, p.value_width, {p.grad.at != nullptr, p.grad.at == nullptr, p.grad.at != nullptr}) {
            const bool back = p.grad.at != nullptr;
            scores = c.take<T>(block_rows * S::tile);
            slopes = c.take<T>(back ? block_rows * S::tile : 0);
            out = c.take<T>(block_rows * (back ? keys : values).padded_width);
            most = c.take<T>(block_rows), sum = c.take<T>(block_rows);
            remains = c.take<T>(block_rows), delta = c.take<T>(block_rows);
            d_key = c.take<T>(back ? longest_group * keys.padded_width : 0);
            d_value = c.take<T>(back ? longest_group * values.padded_width : 0);
            joined_keys = c.take<In>(S::tile * p.width), joined_values = c.take<In>(S::tile * p.value_width);
        }
    };

    // Queries [first, first + count) of a segment, for one head.
    struct Block {
        const Segment& segment;
        std::int64_t head, first, count, panels;
        Block(const Segment& segment, std::int64_t head, std::int64_t first)
            : segment(segment), head(head), first(first), count(smaller(block_rows, segment.length - first)),
              panels(ceil_div(count, P)) {}
        std::int64_t token(std::int64_t i) const { return segment.begin + first + i; }
        std::int64_t place(std::int64_t i) const { return segment.prefix + first + i; }  // index among its keys
    };

    // `size` keys of a segment, beginning with the one at index `place`. The first `in_prefix` of them lie in the
    // prefix, at tokens from `prefix_token` on. The others are the tokens from `token` on.
    struct Keys {
        std::int64_t place, size, in_prefix, prefix_token, token;
        Keys(const Segment& s, std::int64_t place, std::int64_t size)
            : place(place), size(size), in_prefix(std::max<std::int64_t>(0, smaller(size, s.prefix - place))),
              prefix_token(s.prefix_begin + place), token(s.begin + place + in_prefix - s.prefix) {}

        // The rows of the keys. They are copied to `joined` if they are not contiguous.
        WeightTile<In> rows(const HeadProblem& p, std::int64_t width, In* joined) const {
            // At most one tile of a block holds keys of both runs, so few keys are copied.
            if (in_prefix == size) return WeightTile<In>(p, prefix_token, size);
            WeightTile<In> own(p, token, size);
            if (in_prefix == 0) return own;
            const WeightTile<In> before(p, prefix_token, in_prefix);
            for (std::int64_t t = 0; t < size; ++t)
                std::memcpy(joined + t * width,
                            t < in_prefix ? before.at + t * before.stride : own.at + (t - in_prefix) * own.stride,
                            width * sizeof(In));
            own.at = joined, own.stride = width;
            return own;
        }
        // Calls f(index of the first key in the run, its token, number of keys) for the keys in the prefix, and for the
        // keys after it.
        template <typename F>
        void each_part(const F& f) const {
            if (in_prefix > 0) f(0, prefix_token, in_prefix);
            if (in_prefix < size) f(in_prefix, token, size - in_prefix);
        }
    };

    const AttentionProblem& p_;
    const std::int64_t shared_;  // query heads per key head

    Segment segment(std::int64_t i) const {
        const std::int64_t* s = p_.segments + 4 * i;
        return {s[0], s[1], s[2], s[3]};
    }

    HeadProblem product(const Heads& left, std::int64_t head, const Heads& right) const {
        HeadProblem out{};
        out.hidden = static_cast<const In*>(left.at) + head * left.head, out.hidden_stride = left.token;
        out.weight = static_cast<const In*>(right.at) + head / shared_ * right.head, out.weight_stride = right.token;
        return out;
    }

    // Calls f(keys) for the tiles of keys of which the block sees at least one.
    template <typename F>
    void each_tile(const Block& block, const F& f) const {
        const std::int64_t end = block.place(block.count), seen = std::max<std::int64_t>(0, block.place(0) - p_.window + 1);
        for (std::int64_t at = seen / S::tile * S::tile; at < end; at += S::tile)
            f(Keys(block.segment, at, smaller(S::tile, end - at)));
    }

    // Multiplies the scores of a panel by the scaling, and sets them to `hidden_score` where a query does not see a
    // key.
    void scale_panel(const Block& block, std::int64_t panel, const Keys& keys, T* z) const {
        const std::int64_t place = block.place(panel * P), last = place + P - 1;
        const Vec<T> scaling = fill(static_cast<T>(p_.scaling));
        if (keys.place + keys.size - 1 <= place && keys.place > last - p_.window) {
            for (std::int64_t i = 0; i < keys.size * P; i += L) store(z + i, load(z + i) * scaling);
            return;
        }
        Vec<T> first_queries;
        for (int lane = 0; lane < L; ++lane) first_queries[lane] = static_cast<T>(lane);
        for (std::int64_t t = 0; t < keys.size; ++t) {
            // The key is seen by the queries from its own token to the last one that has it in the window.
            const Vec<T> from = fill(static_cast<T>(keys.place + t - place)), to = from + static_cast<T>(p_.window);
            for (int j = 0; j < S::vectors; ++j) {
                const Vec<T> queries = first_queries + static_cast<T>(j * L), u = load(z + t * P + j * L) * scaling;
                store(z + t * P + j * L, ((queries >= from) & (queries < to)) ? u : fill(hidden_score));
            }
        }
    }

    // Turns scores into exp(score - most), and updates per query: `most`, the largest score so far, `sum`, the sum of
    // exponentials so far, and `remains`, the factor by which earlier sums shrink.
    void absorb(Worker& w, std::int64_t panel, std::int64_t size) const {
        for (int j = 0; j < S::vectors; ++j) {
            T* z = w.scores + panel * S::tile * P + j * L;
            const std::int64_t at = panel * P + j * L;
            Vec<T> most = load(w.most + at), total{};
            for (std::int64_t t = 0; t < size; ++t) most = vmax(most, load(z + t * P));
            for (std::int64_t t = 0; t < size; ++t) {
                const Vec<T> e = vexp(load(z + t * P) - most);
                store(z + t * P, e);
                total += e;
            }
            const Vec<T> remains = vexp(load(w.most + at) - most);
            store(w.sum + at, load(w.sum + at) * remains + total);
            store(w.remains + at, remains);
            store(w.most + at, most);
        }
    }

    void forward(Worker& w, const Block& block) const {
        const HeadProblem qk = product(p_.query, block.head, p_.key), pv = product(p_.query, block.head, p_.value);
        const std::int64_t width = w.values.padded_width;
        w.keys.take_rows(RowBlock<In>{qk, block.token(0), block.count});
        std::fill_n(w.most, block_rows, hidden_score);
        std::fill_n(w.sum, block_rows, T{});
        bool fresh = true;
        each_tile(block, [&](const Keys& keys) {
            w.keys.logits(keys.rows(qk, p_.width, w.joined_keys), 0, block.panels, w.scores);
            for (std::int64_t panel = 0; panel < block.panels; ++panel) {
                scale_panel(block, panel, keys, w.scores + panel * S::tile * P);
                absorb(w, panel, keys.size);
            }
            // What was added up for earlier tiles is relative to an older maximum.
            for (std::int64_t i = 0; !fresh && i < block.count; ++i)
                if (w.remains[i] != 1) scale_row(w.out + i * width, width, w.remains[i]);
            w.values.fold(w.scores, block.panels, keys.rows(pv, p_.value_width, w.joined_values), w.out, fresh);
            fresh = false;
        });
        for (std::int64_t i = 0; i < block.count; ++i) {
            const std::int64_t at = block.token(i) * p_.heads + block.head;
            scale_row(w.out + i * width, width, 1 / w.sum[i]);
            write_row(w.out + i * width, static_cast<In*>(p_.out) + at * p_.value_width, p_.value_width);
            static_cast<T*>(p_.log_sums)[at] = w.most[i] + std::log(w.sum[i]);
        }
    }

    static void scale_row(T* row, std::int64_t n, T factor) {
        for (std::int64_t x = 0; x < n; x += L) store(row + x, load(row + x) * factor);
    }

    static void write_row(const T* row, In* out, std::int64_t n) {
        each_vector<T>(n, [&](std::int64_t x, std::int64_t some) { store_some<T>(load(row + x), out + x, some); });
    }

    // Prepares the backward pass of a block, per query: `delta` is the sum of output times gradient, `most` the
    // logarithm of the sum of exponentials. Columns of the last panel without a query get 0.
    void take_statistics(Worker& w, const Block& block, const RowBlock<In>& grads) const {
        for (std::int64_t i = 0; i < block.panels * P; ++i) {
            w.most[i] = w.delta[i] = 0;
            if (i >= block.count) continue;
            const std::int64_t at = block.token(i) * p_.heads + block.head;
            const In *out = static_cast<const In*>(p_.out) + at * p_.value_width, *grad = grads.hidden(i);
            Vec<T> sum{};
            each_vector<T>(p_.value_width, [&](std::int64_t x, std::int64_t n) {
                sum += load_some<T>(out + x, n) * load_some<T>(grad + x, n);
            });
            w.delta[i] = sum_of<T>(sum);
            w.most[i] = static_cast<const T*>(p_.log_sums)[at];
        }
    }

    // Turns scores into probabilities, and the gradients in the probabilities into gradients in the unscaled scores.
    void differentiate(Worker& w, std::int64_t panel, std::int64_t size) const {
        const Vec<T> scaling = fill(static_cast<T>(p_.scaling));
        T *z = w.scores + panel * S::tile * P, *g = w.slopes + panel * S::tile * P;
        for (std::int64_t t = 0; t < size; ++t)
            for (int j = 0; j < S::vectors; ++j) {
                const std::int64_t at = t * P + j * L, query = panel * P + j * L;
                const Vec<T> probability = vexp(load(z + at) - load(w.most + query));
                store(z + at, probability);
                store(g + at, probability * (load(g + at) - load(w.delta + query)) * scaling);
            }
    }

    // The backward pass of one block. d_key and d_value begin at token `origin`.
    //
    //   P = exp(scaling q k' - log of the sum)      the probabilities, recomputed
    //   G = grad v'                                 their gradients
    //   D = scaling P (G - delta)                   the gradients in q k'; delta = sum(P G) = sum(out grad) per query
    //   d_query = D k, d_key += D' q, d_value += P' grad
    void backward(Worker& w, const Block& block, std::int64_t origin) const {
        const HeadProblem qk = product(p_.query, block.head, p_.key), gv = product(p_.grad, block.head, p_.value);
        const RowBlock<In> queries{qk, block.token(0), block.count}, grads{gv, block.token(0), block.count};
        w.keys.take_rows(queries), w.keys.take_rows_for_outer(queries);
        w.values.take_rows(grads), w.values.take_rows_for_outer(grads);
        take_statistics(w, block, grads);
        bool fresh = true;
        each_tile(block, [&](const Keys& keys) {
            const WeightTile<In> k = keys.rows(qk, p_.width, w.joined_keys);
            const WeightTile<In> v = keys.rows(gv, p_.value_width, w.joined_values);
            w.keys.logits(k, 0, block.panels, w.scores);
            w.values.logits(v, 0, block.panels, w.slopes);
            for (std::int64_t panel = 0; panel < block.panels; ++panel) {
                scale_panel(block, panel, keys, w.scores + panel * S::tile * P);
                differentiate(w, panel, keys.size);
            }
            keys.each_part([&](std::int64_t at, std::int64_t token, std::int64_t size) {
                const std::int64_t row = token - origin;
                w.values.outer(w.scores + at * P, block.panels, size, w.d_value + row * w.values.padded_width);
                w.keys.outer(w.slopes + at * P, block.panels, size, w.d_key + row * w.keys.padded_width);
            });
            w.keys.fold(w.slopes, block.panels, k, w.out, fresh);
            fresh = false;
        });
        for (std::int64_t i = 0; i < block.count; ++i)
            write_row(w.out + i * w.keys.padded_width,
                      static_cast<In*>(p_.d_query) + (block.token(i) * p_.heads + block.head) * p_.width, p_.width);
    }

    void backward(Worker& w, std::int64_t first, std::int64_t last, std::int64_t key_head) const {
        const std::int64_t origin = segment(first).begin, tokens = segment(last).begin + segment(last).length - origin;
        std::fill_n(w.d_key, tokens * w.keys.padded_width, T{});
        std::fill_n(w.d_value, tokens * w.values.padded_width, T{});
        for (std::int64_t i = first; i <= last; ++i) {
            const Segment s = segment(i);
            for (std::int64_t head = key_head * shared_; head < (key_head + 1) * shared_; ++head)
                for (std::int64_t row = 0; row < s.length; row += block_rows) backward(w, Block(s, head, row), origin);
        }
        for (std::int64_t i = 0; i < tokens; ++i) {
            const std::int64_t at = (origin + i) * p_.key_heads + key_head;
            write_row(w.d_key + i * w.keys.padded_width, static_cast<In*>(p_.d_key) + at * p_.width, p_.width);
            write_row(w.d_value + i * w.values.padded_width, static_cast<In*>(p_.d_value) + at * p_.value_width,
                      p_.value_width);
        }
    }

    // The last segment of the group that begins with segment `first`. A segment without a prefix begins a new group.
    std::int64_t last_of_group(std::int64_t first) const {
        std::int64_t last = first;
        while (last + 1 < p_.count && segment(last + 1).prefix > 0) ++last;
        return last;
    }

    // Calls f(memory of the worker, item, head) for all items, and for `heads` heads of each.
    template <typename Item, typename F>
    void deal_out(const std::vector<Item>& items, std::int64_t heads, std::int64_t longest_group, const Pool& pool,
                  const F& f) const {
        const std::int64_t all = static_cast<std::int64_t>(items.size()) * heads;
        const Pool some{static_cast<int>(std::max<std::int64_t>(1, smaller(pool.workers, all))), pool.parallel_for};
        Carver size(nullptr);
        Worker(size, p_, longest_group);
        Workspace memory(some.workers * size.used());
        std::atomic<std::int64_t> dealt{0};
        some.run([&](int worker) {
            Carver own(memory.data() + worker * size.used());
            Worker w(own, p_, longest_group);
            for (std::int64_t i; (i = dealt.fetch_add(1, std::memory_order_relaxed)) < all;)
                f(w, items[i / heads], i % heads);
            w.keys.release();
        });
    }

    void run_forward(const Pool& pool) const {
        std::vector<std::pair<std::int64_t, std::int64_t>> blocks;  // a segment, and the first query in it
        for (std::int64_t i = 0; i < p_.count; ++i)
            for (std::int64_t row = 0; row < segment(i).length; row += block_rows) blocks.emplace_back(i, row);
        deal_out(blocks, p_.heads, 0, pool, [&](Worker& w, const auto& block, std::int64_t head) {
            const Segment s = segment(block.first);
            forward(w, Block(s, head, block.second));
        });
    }

    void run_backward(const Pool& pool) const {
        std::vector<std::int64_t> groups;
        std::int64_t longest = 0;
        for (std::int64_t i = 0; i < p_.count; i = last_of_group(i) + 1) {
            const Segment last = segment(last_of_group(i));
            groups.push_back(i);
            longest = std::max(longest, last.begin + last.length - segment(i).begin);
        }
        deal_out(groups, p_.key_heads, longest, pool, [&](Worker& w, std::int64_t first, std::int64_t key_head) {
            backward(w, first, last_of_group(first), key_head);
        });
    }

public:
    explicit AttentionPass(const AttentionProblem& p) : p_(p), shared_(p.heads / p.key_heads) {}

    void run(const Pool& pool) const { p_.grad.at ? run_backward(pool) : run_forward(pool); }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
