#pragma once

// What the checks share: their tensors, bytes of every dtype, and the number of failures.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/kernels.h"

namespace fastalign {
namespace plain { extern const Kernels kernels; }
namespace emulated { extern const Kernels kernels; }
}  // namespace fastalign

using namespace fastalign;
using Bytes = std::vector<unsigned char>;

constexpr std::int64_t kTokens = 41, kVocab = 2311, kWidth = 35, kIgnored = 3;
inline int failures = 0;

// Values that every dtype represents exactly: multiples of 1/8 up to 1.
struct Data {
    std::int64_t tokens, vocab, width;
    std::vector<double> hidden, weight, grad;
    std::vector<std::int64_t> targets, rows;
    explicit Data(std::int64_t tokens = kTokens, std::int64_t vocab = kVocab, std::int64_t width = kWidth)
        : tokens(tokens), vocab(vocab), width(width), hidden(tokens * width), weight(vocab * width), grad(tokens),
          targets(tokens) {
        std::mt19937 random(0);
        auto eighth = [&] { return (static_cast<int>(random() % 17) - 8) / 8.0; };
        for (auto& x : hidden) x = eighth();
        for (auto& x : weight) x = eighth();
        for (auto& x : grad) x = eighth();
        for (auto& y : targets) y = random() % vocab;
        for (std::int64_t i = 0; i < tokens; ++i)
            if (i != kIgnored) rows.push_back(i);
    }
};

inline Bytes encode(const std::vector<double>& values, DType dtype) {
    Bytes out;
    for (double v : values) {
        unsigned char bytes[8];
        std::size_t size = 4;
        const float f = static_cast<float>(v);
        std::uint32_t bits;
        std::memcpy(&bits, &f, 4);
        if (dtype == DType::f64) {
            size = 8, std::memcpy(bytes, &v, 8);
        } else if (dtype == DType::f32) {
            std::memcpy(bytes, &f, 4);
        } else {
            const bool brain = dtype == DType::bf16;
            const std::uint32_t sign = (bits >> 16) & 0x8000u, size_bits = bits & 0x7fffffffu;
            const std::uint32_t half = size_bits ? ((size_bits - 0x38000000u) >> 13) : 0;
            const auto low = static_cast<std::uint16_t>(brain ? bits >> 16 : sign | half);
            size = 2, std::memcpy(bytes, &low, 2);
        }
        out.insert(out.end(), bytes, bytes + size);
    }
    return out;
}

inline std::vector<double> decode(const Bytes& bytes, bool wide) {
    std::vector<double> out(bytes.size() / (wide ? 8 : 4));
    for (std::size_t i = 0; i < out.size(); ++i) {
        float f;
        if (wide) std::memcpy(&out[i], &bytes[i * 8], 8);
        else std::memcpy(&f, &bytes[i * 4], 4), out[i] = f;
    }
    return out;
}

inline void expect(bool good, const char* kernels, int dtype, const char* what, double found) {
    if (good) return;
    ++failures;
    std::printf("FAILED %s dtype %d: %s (%g)\n", kernels, dtype, what, found);
}

inline double relative_error(const std::vector<double>& found, const std::vector<double>& truth) {
    double error = 0, size = 0;
    for (std::size_t i = 0; i < truth.size(); ++i)
        error += (found[i] - truth[i]) * (found[i] - truth[i]), size += truth[i] * truth[i];
    return std::sqrt(error / size);
}

// The checks in heads.cpp.
struct Truth {
    std::vector<double> logprobs, grad_logprobs, d_hidden, d_bias;
};

Truth naive(const Data& data);
void check(const Kernels& kernels, const Data& data, const Truth& truth, DType dtype);
void check_blocks(const Kernels& kernels, DType dtype);
void check_divergence(const Kernels& kernels, const Data& data, DType dtype);
