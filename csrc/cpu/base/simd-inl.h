#pragma once

// Vectors of one instruction set, through the compiler's vector extensions. The same source compiles to SSE2 or NEON,
// AVX2 and AVX-512. A file that includes this header is compiled once per instruction set, with two macros:
// FASTALIGN_ISA is its namespace, which keeps the versions of a function apart in the linker, and
// FASTALIGN_VECTOR_BYTES is the register width.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#if defined(__F16C__)
#include <immintrin.h>
#endif

#define FASTALIGN_INLINE inline __attribute__((always_inline))

namespace fastalign {
namespace FASTALIGN_ISA {

template <typename T>
struct VecOf {
    typedef T type __attribute__((vector_size(FASTALIGN_VECTOR_BYTES)));
    typedef T loose __attribute__((vector_size(FASTALIGN_VECTOR_BYTES), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VecOf<T>::type;

template <typename T>
constexpr int lanes = FASTALIGN_VECTOR_BYTES / sizeof(T);

template <typename T>
FASTALIGN_INLINE Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename VecOf<T>::loose*>(p);
}
template <typename T>
FASTALIGN_INLINE void store(T* p, Vec<T> v) {
    *reinterpret_cast<typename VecOf<T>::loose*>(p) = v;
}
template <typename T>
FASTALIGN_INLINE Vec<T> fill(T x) {
    return Vec<T>{} + x;
}
template <typename V>
FASTALIGN_INLINE V vmax(V a, V b) {
    return a > b ? a : b;  // if a is NaN this is b
}

// e^y within 2 ulp, for -87.3 <= y <= 88 and for NaN. With y = n ln 2 + r, e^y is 2^n times a polynomial in r (its
// coefficients are those of expf in Cephes).
FASTALIGN_INLINE Vec<float> exp_within(Vec<float> y) {
    typedef std::int32_t Ints __attribute__((vector_size(FASTALIGN_VECTOR_BYTES)));
    const float rounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const Vec<float> n = (y * 1.44269504088896341f + rounder) - rounder;
    const Vec<float> r = y - n * 0.693359375f - n * -2.12194440e-4f;
    Vec<float> p = fill(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const Ints scale = (__builtin_convertvector(n, Ints) + 127) << 23;
    return p * reinterpret_cast<Vec<float>>(scale);
}

// e^x for any x: 0 below that range, infinity above it.
FASTALIGN_INLINE Vec<float> vexp(Vec<float> x) {
    const Vec<float> low = fill(-87.3f), high = fill(88.0f);
    Vec<float> y = x < low ? low : x;
    y = y > high ? high : y;
    const Vec<float> p = x < low ? Vec<float>{} : exp_within(y);
    return x > high ? fill(std::numeric_limits<float>::infinity()) : p;
}

// e^x for x <= 0, for sums that contain e^0 = 1. Below -87.3 the result stays at 1e-38, which does not change such a
// sum, so the comparison for 0 can be saved.
FASTALIGN_INLINE Vec<float> vexp_term(Vec<float> x) {
    const Vec<float> low = fill(-87.3f);
    return exp_within(x < low ? low : x);
}

// Double is used for gradient checks, where speed does not matter: call the C library.
FASTALIGN_INLINE Vec<double> vexp(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
    return x;
}

FASTALIGN_INLINE Vec<double> vexp_term(Vec<double> x) { return vexp(x); }

// tanh(x) near 0, where (1 - q) / (1 + q) with q = e^-2x loses the digits of 1 - q: a polynomial, that of tanhf in
// Cephes, for |x| < kTanhNear.
constexpr float kTanhNear = 0.625f;
FASTALIGN_INLINE Vec<float> tanh_near_zero(Vec<float> x) {
    const Vec<float> z = x * x;
    Vec<float> p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    return p * z * x + x;
}

FASTALIGN_INLINE Vec<float> vtanh(Vec<float> x) {
    const Vec<float> size = x < 0 ? -x : x;
    const Vec<float> q = vexp(size * -2), t = (1 - q) / (1 + q);
    return size < kTanhNear ? tanh_near_zero(x) : x < 0 ? -t : t;
}
FASTALIGN_INLINE Vec<double> vtanh(Vec<double> x) {
    for (int i = 0; i < lanes<double>; ++i) x[i] = std::tanh(x[i]);
    return x;
}

// The two 16-bit formats as they are stored.
struct bf16 {
    std::uint16_t bits;
};
struct f16 {
    std::uint16_t bits;
};

FASTALIGN_INLINE float widen(float x) { return x; }
FASTALIGN_INLINE double widen(double x) { return x; }
FASTALIGN_INLINE float widen(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
FASTALIGN_INLINE float widen(f16 x) {
    // The product corrects the bias of the exponent. It also turns subnormal halves into normal floats.
    const std::uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
    float out;
    std::memcpy(&out, &magnitude, 4);
    out *= 0x1p112f;
    std::uint32_t bits;
    std::memcpy(&bits, &out, 4);
    bits |= sign | ((x.bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u);
    std::memcpy(&out, &bits, 4);
    return out;
}

FASTALIGN_INLINE void narrow(float x, float& out) { out = x; }
FASTALIGN_INLINE void narrow(double x, double& out) { out = x; }
FASTALIGN_INLINE void narrow(float x, bf16& out) {  // rounds to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    out.bits = static_cast<std::uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
}
FASTALIGN_INLINE void narrow(float x, f16& out) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const std::uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    std::uint32_t half;
    if (magnitude > 0x7f800000u) {
        half = 0x7e00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the subnormal half in the low bits
        float size;
        std::memcpy(&size, &magnitude, 4);
        size += 0.5f;
        std::memcpy(&half, &size, 4);
        half -= 0x3f000000u;
    } else {
        const std::uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
        half = rounded >= 0x0f800000u ? 0x7c00u : rounded >> 13;
    }
    out.bits = static_cast<std::uint16_t>(sign | half);
}

template <typename In, typename T>
FASTALIGN_INLINE void widen_row(const In* in, T* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = widen(in[i]);
}
template <typename In, typename T>
FASTALIGN_INLINE void narrow_row(const T* in, In* out, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) narrow(in[i], out[i]);
}
#if defined(__F16C__)
FASTALIGN_INLINE void widen_row(const f16* in, float* out, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    for (; i < n; ++i) out[i] = widen(in[i]);
}
FASTALIGN_INLINE void narrow_row(const float* in, f16* out, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
    for (; i < n; ++i) narrow(in[i], out[i]);
}
#endif

// Loads and stores of a vector of accumulators (type T) from and to entries of a tensor's type.
typedef std::uint32_t WordBits __attribute__((vector_size(FASTALIGN_VECTOR_BYTES)));
typedef std::uint16_t HalfBits __attribute__((vector_size(FASTALIGN_VECTOR_BYTES / 2)));

template <typename T>
FASTALIGN_INLINE Vec<T> load_wide(const T* at) {
    return load(at);
}
template <typename T>
FASTALIGN_INLINE Vec<T> load_wide(const f16* at) {
    T wide[lanes<T>];
    widen_row(at, wide, lanes<T>);
    return load(wide);
}
template <typename T>
FASTALIGN_INLINE Vec<T> load_wide(const bf16* at) {  // like `widen`, which the compiler does not vectorise here
    HalfBits half;
    std::memcpy(&half, at, sizeof(half));
    return reinterpret_cast<Vec<T>>(__builtin_convertvector(half, WordBits) << 16);
}

template <typename T>
FASTALIGN_INLINE void store_narrow(Vec<T> values, T* at) {
    store(at, values);
}
template <typename T>
FASTALIGN_INLINE void store_narrow(Vec<T> values, f16* at) {
    T wide[lanes<T>];
    store(wide, values);
    narrow_row(wide, at, lanes<T>);
}
template <typename T>
FASTALIGN_INLINE void store_narrow(Vec<T> values, bf16* at) {  // like `narrow`
    const WordBits bits = reinterpret_cast<WordBits>(values), rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const HalfBits half = __builtin_convertvector((values == values ? rounded : bits | 0x400000u) >> 16, HalfBits);
    std::memcpy(at, &half, sizeof(half));
}

// The first n entries, at most a vector, followed by zeros.
template <typename T, typename In>
FASTALIGN_INLINE Vec<T> load_some(const In* at, std::int64_t n) {
    if (n == lanes<T>) return load_wide<T>(at);
    In some[lanes<T>] = {};
    std::memcpy(some, at, n * sizeof(In));
    return load_wide<T>(some);
}

template <typename T, typename In>
FASTALIGN_INLINE void store_some(Vec<T> values, In* at, std::int64_t n) {
    if (n == lanes<T>) return store_narrow<T>(values, at);
    In some[lanes<T>];
    store_narrow<T>(values, some);
    std::memcpy(at, some, n * sizeof(In));
}

template <typename T>
FASTALIGN_INLINE T sum_of(Vec<T> v) {
    T total = 0;
    for (int lane = 0; lane < lanes<T>; ++lane) total += v[lane];
    return total;
}

// Calls f(first entry, number of entries) for each vector of n entries. The last one may be shorter.
template <typename T, typename F>
FASTALIGN_INLINE void each_vector(std::int64_t n, const F& f) {
    std::int64_t at = 0;
    for (; at + lanes<T> <= n; at += lanes<T>) f(at, lanes<T>);
    if (at < n) f(at, n - at);
}

}  // namespace FASTALIGN_ISA
}  // namespace fastalign
