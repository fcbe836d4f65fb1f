#pragma once

// EWC's penalty and its gradient over any number of tensors, in one read of each. The tensors are cut into chunks,
// dealt out to the workers; each chunk's sum is kept and they are added in order, so that any number of threads gives
// the same bits.

#include <atomic>
#include <type_traits>
#include <vector>

#include "pool.h"
#include "problem.h"
#include "simd.h"

namespace fastalign {
namespace FASTALIGN_ISA {

typedef double TwiceDoubles __attribute__((vector_size(2 * FASTALIGN_VECTOR_BYTES)));  // a vector of floats, widened

// theta and the gradient are In, theta0 is Anchor, F is T.
template <typename T, typename In, typename Anchor>
class EwcPass {
    static constexpr std::int64_t chunk = 1 << 14, block = 512;
    const EwcProblem& p_;
    struct Item {
        std::int64_t tensor, begin;
    };

    // Values as T: where they lie, or widened into `buffer`.
    template <typename X>
    static const T* as_wide(const X* at, std::int64_t n, T* buffer) {
        if constexpr (sizeof(X) == sizeof(T)) {
            return at;
        } else {
            widen_row(at, buffer, n);
            return buffer;
        }
    }

    // The sum of F (theta - theta0)^2 over `n` <= block entries; pull[i] = F (theta - theta0).
    static double one_block(const T* theta, const T* anchor, const T* fisher, std::int64_t n, T* pull) {
        using Doubles = std::conditional_t<sizeof(T) == sizeof(float), TwiceDoubles, Vec<double>>;
        Doubles sum{};
        std::int64_t i = 0;
        for (; i + lanes<T> <= n; i += lanes<T>) {
            const Vec<T> distance = load(theta + i) - load(anchor + i);
            const Vec<T> weighted = fisher ? distance * load(fisher + i) : distance;
            store(pull + i, weighted);
            sum += __builtin_convertvector(weighted * distance, Doubles);
        }
        double total = 0;
        for (int lane = 0; lane < lanes<T>; ++lane) total += sum[lane];
        for (; i < n; ++i) {
            const T distance = theta[i] - anchor[i];
            pull[i] = fisher ? distance * fisher[i] : distance;
            total += static_cast<double>(pull[i] * distance);
        }
        return total;
    }

    void give(const T* pull, std::int64_t n, In* grad, bool fresh) {
        const T strength = static_cast<T>(p_.strength);
        for (std::int64_t i = 0; i < n; ++i)
            narrow(fresh ? strength * pull[i] : static_cast<T>(widen(grad[i])) + strength * pull[i], grad[i]);
    }

    double one_chunk(const Item& item) {
        const EwcTensor& t = p_.tensors[item.tensor];
        const std::int64_t end = item.begin + chunk < t.size ? item.begin + chunk : t.size;
        T theta[block], anchor[block], pull[block];
        double total = 0;
        for (std::int64_t at = item.begin; at < end; at += block) {
            const std::int64_t n = block < end - at ? block : end - at;
            total += one_block(as_wide(static_cast<const In*>(t.parameter) + at, n, theta),
                               as_wide(static_cast<const Anchor*>(t.anchor) + at, n, anchor),
                               t.fisher ? static_cast<const T*>(t.fisher) + at : nullptr, n, pull);
            if (t.grad) give(pull, n, static_cast<In*>(t.grad) + at, t.fresh);
        }
        return total;
    }

public:
    explicit EwcPass(const EwcProblem& p) : p_(p) {}

    // The sum of F (theta - theta0)^2 over all tensors.
    double run(const Pool& pool) {
        std::vector<Item> items;
        for (std::size_t i = 0; i < p_.tensors.size(); ++i)
            for (std::int64_t begin = 0; begin < p_.tensors[i].size; begin += chunk)
                items.push_back({static_cast<std::int64_t>(i), begin});
        std::vector<double> sums(items.size());
        std::atomic<std::size_t> dealt{0};
        pool.run([&](int) {
            for (std::size_t i; (i = dealt.fetch_add(1, std::memory_order_relaxed)) < items.size();)
                sums[i] = one_chunk(items[i]);
        });
        double total = 0;
        for (double sum : sums) total += sum;
        return total;
    }
};

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
