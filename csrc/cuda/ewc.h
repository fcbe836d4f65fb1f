// The arguments of a launch over many tensors (ewc.cu).
#pragma once

#include <cstdint>
#include <vector>

#include "launchers.h"

namespace fastalign::cuda {

constexpr int kHeldBlock = 4096;  // elements per block
constexpr int kHeldTensors = 64;  // tensors per launch, whose arguments may take 4 KiB

struct HeldTensor {
    const void* theta;   // (size,)
    const void* anchor;  // (size,)
    const float* fisher;  // (size,), or null for 1
    void* grad;          // (size,) in theta's dtype, or null
    std::int64_t size;
    bool fresh;       // true: write grad; false: add to it
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

// sums has one entry per block: the total of held_blocks over the tensors. The anchor's dtype is theta's or float32.
int ewc_penalty(DType theta, DType anchor, float strength, const std::vector<HeldTensor>& tensors, double* sums,
                Where where);

}  // namespace fastalign::cuda
