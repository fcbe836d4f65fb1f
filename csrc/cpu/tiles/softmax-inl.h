#pragma once

// The softmax of a panel of logits (tile, panel) while it is in the cache. One column is one token. The beginning of
// fastalign/ops/head/logprobs_tiles.py explains the formulas, and why the target is left out of every sum.

#include "cpu/tiles/products-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// From a product u to a logit: z = softcap * tanh(logit_scale * u / softcap) / temperature, or factor * u without a
// cap.
template <typename T>
struct Head {
    T factor, inner, outer;  // inner = logit_scale / softcap, outer = softcap / temperature
    bool capped;
    Head(double scale, double softcap, double temperature)
        : factor(static_cast<T>(scale / temperature)), inner(static_cast<T>(softcap > 0 ? scale / softcap : 0)),
          outer(static_cast<T>(softcap / temperature)), capped(softcap > 0) {}

    // dz/du under a cap, where it depends on z. A logit of -infinity counts as the lower end of the cap.
    template <typename V>
    FASTALIGN_INLINE V slope(V z) const {
        V t = z * (1 / outer);
        t = t < -1 ? V{} - 1 : t;
        return factor * (1 - t * t);
    }
    T slope_at(T z) const { return capped ? factor * (1 - (z / outer) * (z / outer)) : factor; }
};

// Running sums of the tokens of a block, relative to `shift`. Each is an array over the padded rows of the block. The
// last three are for `ForwardProblem::details` only, and null otherwise.
template <typename T>
struct Sums {
    T *shift, *others, *zothers;
    T* squares = nullptr;  // sum of exp(z - shift)^2
    T* logits = nullptr;   // sum of z, of the target too
    T* rival = nullptr;    // the largest logit that is not the target's; behind the target a hair less than it
};

// The first shift. It is far below any logit but finite, so that (start - m) * 0 on the first tile is 0 and not NaN.
constexpr float kStart = -1e30f;
// The shift follows the running maximum only when the maximum has moved this far. A factor of e^8 costs no digits, and
// the accumulated gradient is hardly ever rescaled.
constexpr float kLag = 8.0f;

// Turns u (tile, panel) into logits in place, and writes the largest logit of each column. It adds each column's logits
// to `sums`, if that is not null.
template <typename T>
FASTALIGN_INLINE void to_logits(T* z, std::int64_t tile, const T* bias, const Head<T>& head, T* largest,
                                T* sums = nullptr) {
    constexpr int L = lanes<T>;
    for (int j = 0; j < Shape<T>::vectors; ++j) {
        Vec<T> top = fill(static_cast<T>(kStart)), sum{};
        T* at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += Shape<T>::panel) {
            Vec<T> u = load(at);
            if (bias) u += bias[t];
            u = head.capped ? vtanh(u * head.inner) * head.outer : u * head.factor;
            store(at, u);
            top = vmax(u, top);
            if (sums) sum += u;
        }
        store(largest + j * L, top);
        if (sums) store(sums + j * L, load(sums + j * L) + sum);
    }
}

// Adds a panel of logits to the running sums, and returns whether the shift of any column moved.
//
//   z          replaced by exp(z - shift), times dz/du if that is not constant
//   zweighted  if not null, receives the same times (z - shift)
//   largest    (panel,) the largest logit of each column
//   moved      (panel,) receives old shift minus new shift
//   shrink     (panel,) receives exp(moved), the factor for what was accumulated with the old shift
template <typename T>
bool absorb(T* z, std::int64_t tile, const T* largest, const Head<T>& head, const Sums<T>& sums, bool entropy,
            bool gradients, T* zweighted, T* shrink, T* moved) {
    using S = Shape<T>;
    constexpr int L = lanes<T>;
    bool any_moved = false;
    for (int j = 0; j < S::vectors; ++j) {
        const Vec<T> old = load(sums.shift + j * L), top = load(largest + j * L);
        const Vec<T> shift = top > old + static_cast<T>(kLag) ? top : old;
        const Vec<T> move = old - shift, down = vexp(move);
        Vec<T> sum{}, zsum{}, squares{};
        T* at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += S::panel) {
            const Vec<T> d = load(at) - shift;
            Vec<T> e = vexp(d);
            sum += e;
            if (sums.squares) squares += e * e;
            if (!entropy && !gradients) continue;
            const Vec<T> slope = gradients && head.capped ? head.slope(load(at)) : fill(T(1));
            if (entropy) {
                const Vec<T> weighted = (d < static_cast<T>(kStart) ? fill(static_cast<T>(kStart)) : d) * e;
                zsum += weighted;
                if (zweighted) store(zweighted + t * S::panel + j * L, weighted * slope);
            }
            store(at, e * slope);
        }
        const Vec<T> others = load(sums.others + j * L), zothers = load(sums.zothers + j * L);
        store(sums.zothers + j * L, down * (zothers + move * others) + zsum);
        store(sums.others + j * L, down * others + sum);
        if (sums.squares) store(sums.squares + j * L, down * down * load(sums.squares + j * L) + squares);
        store(sums.shift + j * L, shift);
        store(shrink + j * L, down);
        store(moved + j * L, move);
        for (int i = 0; i < L; ++i) any_moved |= move[i] != 0;
    }
    return any_moved;
}

// The numbers per token from which the gradient of a panel is computed.
template <typename T>
struct Coefficients {
    T *shift, *mean;   // from the forward pass
    T *logprob;        // -grad_logprob / sum of exponentials
    T *entropy;        // -grad_entropy / sum of exponentials, or null
    T *target;         // the gradient at the target's entry
};

// Turns a panel of products u into the gradient in u. The targets' entries are wrong, and the caller overwrites them.
template <typename T>
void differentiate(T* z, std::int64_t tile, const T* bias, const Head<T>& head, const Coefficients<T>& c) {
    using S = Shape<T>;
    constexpr int L = lanes<T>;
    T largest[S::panel];
    to_logits(z, tile, bias, head, largest);
    for (int j = 0; j < S::vectors; ++j) {
        const Vec<T> shift = load(c.shift + j * L), mean = load(c.mean + j * L), g = load(c.logprob + j * L);
        const Vec<T> g_entropy = c.entropy ? load(c.entropy + j * L) : Vec<T>{};
        T* at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += S::panel) {
            const Vec<T> logit = load(at), d = logit - shift;
            Vec<T> du = g;
            if (c.entropy) du += g_entropy * ((d < static_cast<T>(kStart) ? fill(static_cast<T>(kStart)) : d) - mean);
            du *= vexp(d);
            store(at, head.capped ? du * head.slope(logit) : du * head.factor);
        }
    }
}

// The same from a cached panel exp(z - then) * slope, where `then` is the shift when it was cached.
template <typename T, typename In>
void differentiate_kept(const In* kept, T* du, std::int64_t tile, const Head<T>& head, const Coefficients<T>& c,
                        const T* then) {
    using S = Shape<T>;
    constexpr int L = lanes<T>;
    T scale[S::panel];
    for (int j = 0; j < S::vectors; ++j) {
        const Vec<T> shrink = vexp(load(then + j * L) - load(c.shift + j * L));
        store(scale + j * L, load(c.logprob + j * L) * shrink * (head.capped ? T(1) : head.factor));
    }
    for (std::int64_t t = 0; t < tile; ++t) {
        widen_row(kept + t * S::panel, du + t * S::panel, S::panel);
        for (int j = 0; j < S::vectors; ++j)
            store(du + t * S::panel + j * L, load(du + t * S::panel + j * L) * load(scale + j * L));
    }
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
