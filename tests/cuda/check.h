// What the stand-alone checks share. They run kernels over memory of exactly the right size, for the sanitizers to
// watch; what comes out is compared with the reference in pytest.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "device.h"

using namespace fastalign::cuda;

inline std::mt19937& generator() {
    static std::mt19937 random(0);
    return random;
}
inline float normal() { return std::normal_distribution<float>(0, 3)(generator()); }

// `shift` values lie before the first: memory that is not aligned, as a view of a tensor may be.
template <typename T>
struct Tensor {
    std::vector<T> values;
    std::size_t shift;
    explicit Tensor(std::size_t count, std::size_t shift = 0) : values(count + shift), shift(shift) {}
    T* data() { return values.data() + shift; }
    std::size_t count() const { return values.size() - shift; }
    void fill_normal() {
        for (auto& value : values) value = from_float<T>(normal());
    }
};

template <typename T> constexpr DType kDType = DType::f32;
template <> inline constexpr DType kDType<bf16> = DType::bf16;
template <> inline constexpr DType kDType<fp16> = DType::f16;

inline void expect(int error) {
    if (error) std::printf("launch failed: %d\n", error), std::exit(3);
}
