// Many tensors in one launch: what travels in it (ewc.cu).
#pragma once

#include <cstdint>
#include <vector>

#include "launchers.h"

namespace fastalign::cuda {

constexpr int kHeldBlock = 4096;  // elements of a block
constexpr int kHeldTensors = 64;  // of one launch, whose arguments may take 4 KiB

struct HeldTensor {
    const void* theta;   // (size,); add_squares: the gradient
    const void* anchor;  // (size,)
    float* fisher;       // (size,), or null for 1; read only by ewc_penalty
    void* grad;          // (size,) in theta's dtype, or null
    std::int64_t size;
    bool fresh;       // the gradient is written, not added to
    int first_block;  // set by the launcher
};

struct HeldBatch {
    HeldTensor tensors[kHeldTensors];
    double* sums;  // (blocks,)
    float strength;
    int count;
};
static_assert(sizeof(HeldBatch) <= 4096, "a kernel's arguments");

inline std::int64_t held_blocks(std::int64_t size) { return (size + kHeldBlock - 1) / kHeldBlock; }

// sums: (total of held_blocks,). The anchor's dtype is theta's or float32.
int ewc_penalty(DType theta, DType anchor, float strength, const std::vector<HeldTensor>& tensors, double* sums,
                Where where);
int add_squares(DType grad, const std::vector<HeldTensor>& tensors, Where where);

}  // namespace fastalign::cuda
