#pragma once

// Log-probs of targets from logits that exist already. Forward reads each row once, backward reads and writes it once.
// A row is processed in blocks that fit L1. The blocks are counted from the start of the row, so its result depends on
// nothing else. fastalign/ops/selective_logprobs.py explains the formulas, and why the target is left out of the sum.

#include <algorithm>
#include <atomic>

#include "cpu/base/pool.h"
#include "cpu/base/problem.h"
#include "cpu/base/simd-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

constexpr std::int64_t kRowBlock = 1024;      // logits per block, which fits L1
constexpr std::int64_t kRowsShare = 1 << 16;  // logits that a worker takes at a time, rounded to whole rows

// Stores past the caches. With ordinary stores each cache line of a large result is read before it is written.
inline void stream_bytes(const void* from, void* to, std::size_t bytes) {
#if defined(__AVX__)
    const auto* in = static_cast<const unsigned char*>(from);
    auto* out = static_cast<unsigned char*>(to);
    const std::size_t head = std::min(bytes, (32 - reinterpret_cast<std::uintptr_t>(out) % 32) % 32);
    std::memcpy(out, in, head);
    std::size_t i = head;
    for (; i + 32 <= bytes; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
    std::memcpy(out + i, in + i, bytes - i);
#else
    std::memcpy(to, from, bytes);
#endif
}

inline void finish_streams() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

template <typename T, typename In>
struct SelectivePass {
    static constexpr int kWays = 4;  // independent sums, because a single one would wait for each addition
    static constexpr int kStep = kWays * lanes<T>;

    const SelectiveProblem& p;
    const T inverse = static_cast<T>(1 / p.temperature);

    const In* row(std::int64_t r) const {
        return static_cast<const In*>(p.logits) + r / p.inner * p.outer_stride + r % p.inner * p.inner_stride;
    }

    // n logits from `start` on as T. The target is replaced by -infinity, and so is the padding up to a multiple of
    // kStep.
    const T* block(const In* logits, std::int64_t start, std::int64_t n, std::int64_t target, T* buffer) const {
        const bool holds_target = target >= start && target < start + n;
        if constexpr (std::is_same_v<T, In>)
            if (!holds_target && n % kStep == 0) return logits + start;
        widen_row(logits + start, buffer, n);
        std::fill(buffer + n, buffer + (n + kStep - 1) / kStep * kStep, -std::numeric_limits<T>::infinity());
        if (holds_target) buffer[target - start] = -std::numeric_limits<T>::infinity();
        return buffer;
    }

    static T largest(const T* z, std::int64_t n) {
        Vec<T> top[kWays];
        for (auto& t : top) t = fill(-std::numeric_limits<T>::infinity());
        for (std::int64_t i = 0; i < n; i += kStep)
            for (int w = 0; w < kWays; ++w) top[w] = vmax(load(z + i + w * lanes<T>), top[w]);
        T out = top[0][0];
        for (const auto& t : top)
            for (int l = 0; l < lanes<T>; ++l) out = std::max(out, static_cast<T>(t[l]));
        return out;
    }

    double exponentials(const T* z, std::int64_t n, T shift) const {
        Vec<T> sum[kWays] = {};
        for (std::int64_t i = 0; i < n; i += kStep)
            for (int w = 0; w < kWays; ++w) sum[w] += vexp_term((load(z + i + w * lanes<T>) - shift) * inverse);
        double out = 0;
        for (const auto& s : sum)
            for (int l = 0; l < lanes<T>; ++l) out += s[l];
        return out;
    }

    void forward(std::int64_t r) const {
        const In* logits = row(r);
        const std::int64_t target = p.targets[r];
        T buffer[kRowBlock], shift = -std::numeric_limits<T>::infinity();
        double others = 0;
        for (std::int64_t start = 0; start < p.vocab; start += kRowBlock) {
            const std::int64_t n = std::min(kRowBlock, p.vocab - start), padded = (n + kStep - 1) / kStep * kStep;
            const T* z = block(logits, start, n, target, buffer);
            const T top = largest(z, padded);
            if (top > shift) {
                others *= std::exp(static_cast<double>(shift - top) / p.temperature);
                shift = top;
            }
            // A row that is all -infinity so far adds 0. But it may contain NaN, which no comparison finds: add that.
            if (shift > -std::numeric_limits<T>::infinity()) others += exponentials(z, padded, shift);
            else for (std::int64_t i = 0; i < n; ++i) others += z[i] == z[i] ? 0.0 : z[i];
        }
        static_cast<T*>(p.stats)[2 * r] = shift;
        static_cast<T*>(p.stats)[2 * r + 1] = static_cast<T>(others);
        const double x = odds(r, others, shift);
        static_cast<T*>(p.logprobs)[r] = static_cast<T>(std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))));
    }

    // The log-odds of the target: its logit minus the log-sum-exp of all other logits. They are NaN where the target's
    // logit is +infinity: a logit that overflowed must not look like a certain target.
    double odds(std::int64_t r, double others, T shift) const {
        const double target = widen(row(r)[p.targets[r]]);
        if (target == std::numeric_limits<double>::infinity()) return std::numeric_limits<double>::quiet_NaN();
        if (others == 0 && target > -std::numeric_limits<double>::infinity()) return std::numeric_limits<double>::infinity();
        return (target - shift) / p.temperature - std::log(others);
    }

    // d logits = grad / temperature * (onehot - softmax), written to `out`, which may be the row itself.
    void backward(std::int64_t r, In* out, bool streaming) const {
        const In* logits = row(r);
        const T shift = static_cast<const T*>(p.stats)[2 * r], others = static_cast<const T*>(p.stats)[2 * r + 1];
        const double grad = static_cast<const T*>(p.grad)[r] / p.temperature;
        const double miss = 1 / (1 + std::exp(odds(r, others, shift)));
        // Without other entries miss is 0, or NaN where the target's logit is infinite.
        const T scale = static_cast<T>(-grad * miss / (others == 0 ? 1 : others));
        const T base = others == 0 ? std::numeric_limits<T>::max() : shift;  // -infinity minus itself would be NaN
        T wide[kRowBlock];
        In narrowed[kRowBlock];
        for (std::int64_t start = 0; start < p.vocab; start += kRowBlock) {
            const std::int64_t n = std::min(kRowBlock, p.vocab - start);
            const T* z = block(logits, start, n, p.targets[r], wide);
            for (std::int64_t i = 0; i < n; i += kStep)
                for (int w = 0; w < kWays; ++w) {
                    const std::int64_t at = i + w * lanes<T>;
                    store(wide + at, vexp((load(z + at) - base) * inverse) * scale);
                }
            if (const std::int64_t at = p.targets[r] - start; at >= 0 && at < n) wide[at] = static_cast<T>(grad * miss);
            const void* result = wide;
            if constexpr (!std::is_same_v<T, In>) narrow_row(wide, narrowed, n), result = narrowed;
            if (streaming) stream_bytes(result, out + start, n * sizeof(In));
            else std::memcpy(out + start, result, n * sizeof(In));
        }
    }

    template <typename F>
    void each_row(const Pool& pool, const F& f) const {
        const std::int64_t share = std::max<std::int64_t>(1, kRowsShare / std::max<std::int64_t>(1, p.vocab));
        std::atomic<std::int64_t> next{0};
        Pool crew = pool;
        crew.workers = static_cast<int>(std::min<std::int64_t>(pool.workers, (p.rows + share - 1) / share));
        crew.run([&](int) {
            for (std::int64_t start; (start = next.fetch_add(share)) < p.rows;)
                for (std::int64_t r = start; r < std::min(start + share, p.rows); ++r) f(r);
            finish_streams();
        });
    }

    void run_forward(const Pool& pool) const {
        each_row(pool, [this](std::int64_t r) {
            if (p.targets[r] != p.ignore_index) return forward(r);
            static_cast<T*>(p.logprobs)[r] = 0;
            static_cast<T*>(p.stats)[2 * r] = static_cast<T*>(p.stats)[2 * r + 1] = 0;
        });
    }

    void run_backward(const Pool& pool) const {
        const bool streaming = p.d_logits && p.rows * p.vocab * sizeof(In) > p.cache_bytes;
        each_row(pool, [this, streaming](std::int64_t r) {
            In* out = p.d_logits ? static_cast<In*>(p.d_logits) + r * p.vocab : const_cast<In*>(row(r));
            if (p.targets[r] != p.ignore_index) return backward(r, out, streaming);
            std::memset(static_cast<void*>(out), 0, p.vocab * sizeof(In));
        });
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
