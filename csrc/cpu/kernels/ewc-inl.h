#pragma once

// EWC's penalty and its gradient over any number of tensors, each of which is read once. The tensors are cut into
// chunks for the workers. The sums of the chunks are stored and added in order, so any number of threads gives the same
// bits.

#include <atomic>
#include <cstring>
#include <type_traits>
#include <vector>

#include "cpu/base/pool.h"
#include "cpu/base/problem.h"
#include "cpu/base/simd-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// A sum of vectors of T in double.
template <typename T>
struct WideSum {
    static constexpr int parts = sizeof(double) / sizeof(T);
    typedef T Part __attribute__((vector_size(FASTALIGN_VECTOR_BYTES / parts)));
    Vec<double> sums[parts] = {};

    // Converts part by part, because compilers convert a whole vector, which needs two registers, value by value in
    // memory.
    void add(Vec<T> values) {
        Part part[parts];
        std::memcpy(part, &values, sizeof(values));
        for (int i = 0; i < parts; ++i) sums[i] += __builtin_convertvector(part[i], Vec<double>);
    }
    double total() const {
        double out = 0;
        for (const auto& sum : sums)
            for (int lane = 0; lane < lanes<double>; ++lane) out += sum[lane];
        return out;
    }
};

// theta and the gradient are In, theta0 is Anchor, F is T.
template <typename T, typename In, typename Anchor>
class EwcPass {
    static constexpr std::int64_t chunk = 1 << 16, block = 512, step = lanes<T>;
    const EwcProblem& p_;
    const T strength_;
    struct Item {
        std::int64_t tensor, begin;
    };
    struct Streams {
        const In* theta;
        const Anchor* anchor;
        const T* fisher;  // or null for 1 everywhere
        In* grad;         // or null
        bool fresh;
    };

    // Returns F (theta - theta0)^2 of a vector of entries, and writes their gradient. All tensors are read side by
    // side, because reading one after another would have fewer cache lines in flight.
    FASTALIGN_INLINE Vec<T> one_step(const Streams& s, std::int64_t at) const {
        const Vec<T> distance = load_wide<T>(s.theta + at) - load_wide<T>(s.anchor + at);
        const Vec<T> weighted = s.fisher ? distance * load(s.fisher + at) : distance;
        if (s.grad && s.fresh) store_narrow<T>(weighted * strength_, s.grad + at);
        else if (s.grad) store_narrow<T>(load_wide<T>(s.grad + at) + weighted * strength_, s.grad + at);
        return weighted * distance;
    }

    // The same for fewer entries than a vector has. They are copied and padded with zeros.
    Vec<T> last_step(const Streams& s, std::int64_t at, std::int64_t n) const {
        In theta[step] = {}, grad[step] = {};
        Anchor anchor[step] = {};
        T fisher[step] = {};
        std::memcpy(theta, s.theta + at, n * sizeof(In));
        std::memcpy(anchor, s.anchor + at, n * sizeof(Anchor));
        if (s.fisher) std::memcpy(fisher, s.fisher + at, n * sizeof(T));
        if (s.grad) std::memcpy(grad, s.grad + at, n * sizeof(In));
        const Vec<T> terms = one_step({theta, anchor, s.fisher ? fisher : nullptr, s.grad ? grad : nullptr, s.fresh}, 0);
        if (s.grad) std::memcpy(s.grad + at, grad, n * sizeof(In));
        return terms;
    }

    double one_chunk(const Item& item) const {
        const EwcTensor& t = p_.tensors[item.tensor];
        const Streams s{static_cast<const In*>(t.parameter), static_cast<const Anchor*>(t.anchor),
                        static_cast<const T*>(t.fisher), static_cast<In*>(t.grad), t.fresh};
        const std::int64_t end = item.begin + chunk < t.size ? item.begin + chunk : t.size;
        double total = 0;
        for (std::int64_t at = item.begin; at < end;) {  // in blocks, because long sums lose digits, in double too
            WideSum<T> sum;
            for (const std::int64_t stop = at + block < end ? at + block : end; at < stop; at += step)
                sum.add(at + step <= stop ? one_step(s, at) : last_step(s, at, stop - at));
            total += sum.total();
        }
        return total;
    }

public:
    explicit EwcPass(const EwcProblem& p) : p_(p), strength_(static_cast<T>(p.strength)) {}

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
