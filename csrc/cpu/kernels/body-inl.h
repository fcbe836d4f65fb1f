#pragma once

// Root-mean-square norms and gated activations, each in one pass over its tensors. Workers take blocks of rows, and one
// worker computes a whole row, so any number of threads gives the same bits.

#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu/base/pool.h"
#include "cpu/base/problem.h"
#include "cpu/base/simd-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// Calls f(begin, end) for blocks of [0, size).
template <typename F>
void deal_out(std::int64_t size, std::int64_t block, const Pool& pool, const F& f) {
    std::atomic<std::int64_t> dealt{0};
    pool.run([&](int) {
        for (std::int64_t at; (at = dealt.fetch_add(block, std::memory_order_relaxed)) < size;)
            f(at, std::min(at + block, size));
    });
}

// y = x r w with r = 1 / sqrt(mean(x^2) + eps), for each row.
template <typename T, typename In>
class RmsNormPass {
    static constexpr std::int64_t block = 16;
    const RmsNormProblem& p_;
    const std::int64_t n_;
    const In *x_, *weight_;

    void forward(std::int64_t row) const {
        const In* x = x_ + row * n_;
        In* out = static_cast<In*>(p_.out) + row * n_;
        Vec<T> squares{};
        each_vector<T>(n_, [&](std::int64_t at, std::int64_t n) {
            const Vec<T> v = load_some<T>(x + at, n);
            squares += v * v;
        });
        const T r = 1 / std::sqrt(sum_of<T>(squares) / n_ + static_cast<T>(p_.eps));
        static_cast<T*>(p_.scale)[row] = r;
        each_vector<T>(n_, [&](std::int64_t at, std::int64_t n) {
            store_some<T>(load_some<T>(x + at, n) * r * load_some<T>(weight_ + at, n), out + at, n);
        });
    }

    // d x = r (g w - x r^2 mean(g w x))
    void backward(std::int64_t row) const {
        const In *x = x_ + row * n_, *g = static_cast<const In*>(p_.grad) + row * n_;
        In* out = static_cast<In*>(p_.out) + row * n_;
        Vec<T> products{};
        each_vector<T>(n_, [&](std::int64_t at, std::int64_t n) {
            products += load_some<T>(g + at, n) * load_some<T>(weight_ + at, n) * load_some<T>(x + at, n);
        });
        const T r = static_cast<const T*>(p_.scale)[row], mean = sum_of<T>(products) / n_ * r * r;
        each_vector<T>(n_, [&](std::int64_t at, std::int64_t n) {
            const Vec<T> gw = load_some<T>(g + at, n) * load_some<T>(weight_ + at, n);
            store_some<T>((gw - load_some<T>(x + at, n) * mean) * r, out + at, n);
        });
    }

public:
    explicit RmsNormPass(const RmsNormProblem& p)
        : p_(p), n_(p.width), x_(static_cast<const In*>(p.x)), weight_(static_cast<const In*>(p.weight)) {}

    void run(const Pool& pool) const {
        deal_out(p_.rows, block, pool, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t row = begin; row < end; ++row) p_.grad ? backward(row) : forward(row);
        });
    }
};

// y = g s u with s = 1 / (1 + e^-g), where g is the gate and u is `up`.
template <typename T, typename In>
class GatedPass {
    static constexpr std::int64_t block = 1 << 13;
    const GatedProblem& p_;

    void step(std::int64_t at, std::int64_t n) const {
        const Vec<T> g = load_some<T>(static_cast<const In*>(p_.gate) + at, n);
        const Vec<T> u = load_some<T>(static_cast<const In*>(p_.up) + at, n);
        const Vec<T> s = 1 / (1 + vexp(-g)), silu = g * s;
        if (!p_.grad) return store_some<T>(silu * u, static_cast<In*>(p_.out) + at, n);
        const Vec<T> d = load_some<T>(static_cast<const In*>(p_.grad) + at, n);
        store_some<T>(d * u * (s + silu * (1 - s)), static_cast<In*>(p_.d_gate) + at, n);
        store_some<T>(d * silu, static_cast<In*>(p_.d_up) + at, n);
    }

public:
    explicit GatedPass(const GatedProblem& p) : p_(p) {}

    void run(const Pool& pool) const {
        deal_out(p_.size, block, pool, [&](std::int64_t begin, std::int64_t end) {
            each_vector<T>(end - begin, [&](std::int64_t at, std::int64_t n) { step(begin + at, n); });
        });
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
