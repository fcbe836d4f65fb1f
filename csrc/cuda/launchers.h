// The border between bindings_cuda.cpp and the kernels, in plain C++: structs of raw addresses, shapes and options, and
// one function per kernel launch. Python (fastalign/ops/native_cuda.py) has checked shapes, strides and dtypes; targets
// are checked by the kernels, for only they look at them. Every launcher returns a cudaError_t as int.
#pragma once

#include <cstdint>

namespace fastalign::cuda {

enum class DType : int { f32, bf16, f16 };

struct Where {
    int device;
    void* stream;  // a cudaStream_t
};

const char* error_string(int error);

// Log-probabilities of targets under logits that exist (selective_logprobs.cu).
struct Gather {
    DType dtype;
    const void* logits;           // (rows, vocab), unit column stride
    std::int64_t stride;          // elements between rows
    const std::int64_t* targets;  // (rows,)
    std::int64_t rows, vocab, ignore_index;
    float factor;                 // 1 / temperature
    float* logprobs;              // (rows,) forward: result
    float* stats;                 // (rows, 2) maximum and log sum exp(z - maximum)
    const float* grad;            // (rows,) backward: of the log-probabilities
    void* grad_logits;            // (rows, vocab), as logits; may be logits itself
};
int selective_logprobs(const Gather& problem, Where where);
int selective_logprobs_backward(const Gather& problem, Where where);

}  // namespace fastalign::cuda
