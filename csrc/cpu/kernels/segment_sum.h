#pragma once

#include <cstdint>

namespace fastalign {

// out[i] = sum of values[offsets[i]] to values[offsets[i + 1] - 1], summed in double for every T.
// offsets has segments + 1 ascending entries, which the caller has checked.
template <typename T>
void segment_sum(const T* values, const std::int64_t* offsets, std::int64_t segments, T* out) {
    for (std::int64_t i = 0; i < segments; ++i) {
        double sum = 0.0;
        for (std::int64_t j = offsets[i]; j < offsets[i + 1]; ++j) sum += values[j];
        out[i] = static_cast<T>(sum);
    }
}

}  // namespace fastalign
