#pragma once

// What happens to a panel of logits (tile, panel) while it lies in cache: one column is one token. The mathematics,
// and why the target stays out of every sum, are told at the head of fastalign/ops/tiles.py.

#include "cpu/tiles/products-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// z = softcap * tanh(logit_scale * u / softcap) / temperature, or factor * u without a cap.
template <typename T>
struct Head {
    T factor, inner, outer;  // inner = logit_scale / softcap, outer = softcap / temperature
    bool capped;
    Head(double scale, double softcap, double temperature)
        : factor(static_cast<T>(scale / temperature)), inner(static_cast<T>(softcap > 0 ? scale / softcap : 0)),
          outer(static_cast<T>(softcap / temperature)), capped(softcap > 0) {}

    // dz/du, which a cap makes vary. Logits set to -infinity count as the cap's lower end.
    template <typename V>
    FASTALIGN_INLINE V slope(V z) const {
        V t = z * (1 / outer);
        t = t < -1 ? V{} - 1 : t;
        return factor * (1 - t * t);
    }
    T slope_at(T z) const { return capped ? factor * (1 - (z / outer) * (z / outer)) : factor; }
};

// Running sums of the tokens of a block (arrays over its padded rows), relative to `shift`.
template <typename T>
struct Sums {
    T *shift, *others, *zothers;
};

// Far below any logit, yet finite: (start - m) * 0 is 0 and not NaN on the first tile.
constexpr float kStart = -1e30f;
// The reference follows the running maximum only when that has moved this far: e^8 costs no digits, and the
// accumulated gradient is hardly ever rescaled.
constexpr float kLag = 8.0f;

// u -> z in place, and the largest of each column.
template <typename T>
FASTALIGN_INLINE void to_logits(T* z, std::int64_t tile, const T* bias, const Head<T>& head, T* largest) {
    constexpr int L = lanes<T>;
    for (int j = 0; j < Shape<T>::vectors; ++j) {
        Vec<T> top = fill(static_cast<T>(kStart));
        T* at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += Shape<T>::panel) {
            Vec<T> u = load(at);
            if (bias) u += bias[t];
            u = head.capped ? vtanh(u * head.inner) * head.outer : u * head.factor;
            store(at, u);
            top = vmax(u, top);
        }
        store(largest + j * L, top);
    }
}

// Folds a panel of logits into the sums; leaves `exp(z - shift)` in place (times dz/du where that varies), and in
// `zweighted` (if not null) the same times (z - shift). largest: of each column. shrink, moved (panel): exp of, and
// the, move of the shift. True if any moved.
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
        Vec<T> sum{}, zsum{};
        T* at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += S::panel) {
            const Vec<T> d = load(at) - shift;
            Vec<T> e = vexp(d);
            sum += e;
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
        store(sums.shift + j * L, shift);
        store(shrink + j * L, down);
        store(moved + j * L, move);
        for (int i = 0; i < L; ++i) any_moved |= move[i] != 0;
    }
    return any_moved;
}

// What the gradient of a panel is made of, per token.
template <typename T>
struct Coefficients {
    T *shift, *mean;   // of the forward pass
    T *logprob;        // -grad_logprob / sum of exponentials
    T *entropy;        // -grad_entropy / sum of exponentials, or null
    T *target;         // the target's own entry
};

// From a panel of products u to the gradient in u, but for the targets' entries.
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

// The same from a kept panel, exp(z - then) * slope, whose shift `then` may have moved since.
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
