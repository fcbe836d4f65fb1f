#pragma once

// The arithmetic of linear_divergence on a panel of student logits and a panel of teacher logits, (tile, panel) each.
// One column is one token. fastalign/ops/head/divergence_terms.py is the definition.

#include "cpu/base/problem.h"
#include "cpu/tiles/softmax-inl.h"

namespace fastalign {
namespace FASTALIGN_ISA {

// tanh(d) for two numbers s and t with log(t / s) = 2 d. It equals (t - s) / (t + s), except near 0, where the
// difference t - s has lost its digits.
FASTALIGN_INLINE Vec<float> tanh_of_half_ratio(Vec<float> d, Vec<float> s, Vec<float> t) {
    const Vec<float> tiny = fill(std::numeric_limits<float>::min()), w = s + t;
    return d * d < kTanhNear * kTanhNear ? tanh_near_zero(d) : (t - s) / (w < tiny ? tiny : w);
}
FASTALIGN_INLINE Vec<double> tanh_of_half_ratio(Vec<double> d, Vec<double>, Vec<double>) {
    for (int i = 0; i < lanes<double>; ++i) d[i] = std::tanh(d[i]);
    return d;
}

// log(1 + x) within 3 ulp, for x >= eps - 1. It is log(u) x / (u - 1), where u is the rounded 1 + x, and log(u) is that
// of logf in Cephes.
FASTALIGN_INLINE Vec<float> vlog1p(Vec<float> x) {
    typedef std::int32_t Ints __attribute__((vector_size(FASTALIGN_VECTOR_BYTES)));
    const Vec<float> u = x + 1.0f;
    const Ints bits = reinterpret_cast<Ints>(u), low = (bits & 0x7fffff) | 0x3f000000;  // mantissa in [1/2, 1)
    Vec<float> f = reinterpret_cast<Vec<float>>(low);
    Vec<float> e = __builtin_convertvector((bits >> 23) - 126, Vec<float>);
    const auto small = f < 0.707106781186547524f;
    e = small ? e - 1.0f : e;
    f = (small ? f + f : f) - 1.0f;
    Vec<float> p = f * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    const Vec<float> z = f * f;
    p = p * f * z + e * -2.12194440e-4f - z * 0.5f;
    const Vec<float> log_u = f + p + e * 0.693359375f, step = u - 1.0f;
    return step == 0 ? x : log_u * x / step;
}
FASTALIGN_INLINE Vec<double> vlog1p(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::log1p(x[i]);
    return x;
}

// Turns a panel of products u into logits in place (-infinity becomes a finite number), and adds exp(z - top) to a
// running sum.
template <typename T>
void absorb_sum(T* z, std::int64_t tile, const T* bias, const Head<T>& head, T* top, T* sum) {
    constexpr int L = lanes<T>;
    const Vec<T> start = fill(static_cast<T>(kStart));
    for (int j = 0; j < Shape<T>::vectors; ++j) {
        Vec<T> largest = start;
        T* at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += Shape<T>::panel) {
            Vec<T> u = load(at);
            if (bias) u += bias[t];
            u = u < start ? start : u;
            u = head.capped ? vtanh(u * head.inner) * head.outer : u * head.factor;
            store(at, u);
            largest = vmax(u, largest);
        }
        const Vec<T> old = load(top + j * L), shift = largest > old + static_cast<T>(kLag) ? largest : old;
        Vec<T> total{};  // summed separately, because adding each term to the running sum would lose more digits
        at = z + j * L;
        for (std::int64_t t = 0; t < tile; ++t, at += Shape<T>::panel) total += vexp(load(at) - shift);
        store(sum + j * L, load(sum + j * L) * vexp(old - shift) + total), store(top + j * L, shift);
    }
}

// Numbers per token of a panel: the normalisers of both sides, and the sums to which `add_terms` adds.
template <typename T>
struct DivergenceRows {
    const T *student_top, *student_log, *teacher_top, *teacher_log;
    T *value, *moment;
};

// The term of a divergence at one entry of the vocabulary, from log s and log t. The gradient is made of `first` and
// `second`: for forward_kl they are s - t and 0, else s and s times its log-ratio. The sum of `second` is the moment.
template <Divergence kind, typename T>
FASTALIGN_INLINE Vec<T> term(Vec<T> log_s, Vec<T> log_t, T beta, Vec<T>& first, Vec<T>& second) {
    const Vec<T> s = vexp(log_s), t = vexp(log_t);
    if constexpr (kind == Divergence::jsd) {
        const Vec<T> tiny = fill(std::numeric_limits<T>::min()), low = fill(std::numeric_limits<T>::epsilon() - 1);
        Vec<T> m = s + beta * (t - s);
        m = m < tiny ? tiny : m;
        const Vec<T> x = (t - s) / m, up = x * (1 - beta), down = x * -beta;
        first = s, second = s * vlog1p(down < low ? low : down);
        return beta * (t * vlog1p(up < low ? low : up)) + (1 - beta) * second;
    } else {
        const Vec<T> d = (log_t - log_s) * T(0.5), w = s + t, tanh = tanh_of_half_ratio(d, s, t);
        if constexpr (kind == Divergence::forward_kl) {
            first = -w * tanh, second = Vec<T>{};
            return w * (d * tanh + d - tanh);
        } else {
            first = (w - w * tanh) * T(0.5), second = first * d * -2;
            return w * (d * tanh - d + tanh);
        }
    }
}

template <Divergence kind, typename T>
void add_terms_of(T* a, T* b, std::int64_t tile, const DivergenceRows<T>& rows, T beta, const Head<T>& head, bool store_) {
    constexpr int L = lanes<T>;
    for (int j = 0; j < Shape<T>::vectors; ++j) {
        const Vec<T> top_s = load(rows.student_top + j * L), log_s = load(rows.student_log + j * L);
        const Vec<T> top_t = load(rows.teacher_top + j * L), log_t = load(rows.teacher_log + j * L);
        Vec<T> value{}, moment{};
        for (std::int64_t t = 0; t < tile; ++t) {
            T *at = a + t * Shape<T>::panel + j * L, *bt = b + t * Shape<T>::panel + j * L;
            const Vec<T> z = load(at);
            Vec<T> first, second;
            value += term<kind, T>(z - top_s - log_s, load(bt) - top_t - log_t, beta, first, second);
            moment += second;
            if (!store_) continue;
            const Vec<T> slope = head.capped ? head.slope(z) : fill(T(1));
            store(at, first * slope);
            if constexpr (kind != Divergence::forward_kl) store(bt, second * slope);
        }
        store(rows.value + j * L, load(rows.value + j * L) + value);
        store(rows.moment + j * L, load(rows.moment + j * L) + moment);
    }
}

// Adds the terms of a panel to the sums of its rows. With `gradients`, a and b are replaced by what the gradient is
// made of.
template <typename T>
void add_terms(Divergence kind, T* a, T* b, std::int64_t tile, const DivergenceRows<T>& rows, T beta,
               const Head<T>& head, bool gradients) {
    switch (kind) {
        case Divergence::forward_kl:
            return add_terms_of<Divergence::forward_kl>(a, b, tile, rows, beta, head, gradients);
        case Divergence::reverse_kl:
            return add_terms_of<Divergence::reverse_kl>(a, b, tile, rows, beta, head, gradients);
        case Divergence::jsd: return add_terms_of<Divergence::jsd>(a, b, tile, rows, beta, head, gradients);
    }
}

// Computes the gradient in the student's logits from what `add_terms` left, and writes it into a.
template <typename T>
void differentiate_divergence(Divergence kind, T* a, const T* b, std::int64_t tile, const T* moment, T scale) {
    constexpr int L = lanes<T>;
    if (kind == Divergence::forward_kl && scale == 1) return;
    for (int j = 0; j < Shape<T>::vectors; ++j) {
        const Vec<T> k = load(moment + j * L);
        for (std::int64_t t = 0; t < tile; ++t) {
            T* at = a + t * Shape<T>::panel + j * L;
            const Vec<T> c = kind == Divergence::forward_kl
                                 ? load(at)
                                 : load(b + t * Shape<T>::panel + j * L) - k * load(at);
            store(at, c * scale);
        }
    }
}

// Multiplies a panel of gradients by one number per token.
template <typename T>
void scale_tokens(T* z, std::int64_t tile, const T* by) {
    for (int j = 0; j < Shape<T>::vectors; ++j) {
        const Vec<T> factor = load(by + j * lanes<T>);
        T* at = z + j * lanes<T>;
        for (std::int64_t t = 0; t < tile; ++t, at += Shape<T>::panel) store(at, load(at) * factor);
    }
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
