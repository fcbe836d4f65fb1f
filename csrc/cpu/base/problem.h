#pragma once

// The arguments of the kernels: plain structs of raw pointers, shapes and options. Python fills them in and has checked
// every shape, dtype and target before.

#include <cstdint>
#include <vector>

namespace fastalign {

enum class DType : int { f32, f64, bf16, f16 };

// The linear head and its scored rows. "Acc" is the type of accumulators: float, or double for f64 tensors.
struct HeadProblem {
    DType dtype;                  // of hidden, weight and cache
    const void* hidden;           // (tokens, width), unit column stride
    std::int64_t hidden_stride;   // elements between rows
    const void* weight;           // (vocab, width), unit column stride
    std::int64_t weight_stride;
    const void* bias;             // Acc (vocab,), or null
    const std::int64_t* targets;  // (tokens, targets_per_token), ascending per token; the sums leave these entries out
    std::int64_t targets_per_token = 1;
    const std::int64_t* rows;     // (scored,) the tokens that are scored, or null for all tokens
    std::int64_t scored, vocab, width;
    double logit_scale, softcap, temperature;  // softcap 0: no cap
    void* cache;                  // (cache_rows / panel, vocab, panel): exp(z - shift) * slope, or null
    void* shifts;                 // Acc (cache_rows / panel, tiles, panel)
    std::int64_t cache_rows;      // a multiple of the panel
};

// Results are indexed by token. Entries of tokens that are not scored are not written (the caller zeroes them).
struct ForwardProblem : HeadProblem {
    void* logprobs;       // Acc (tokens,)
    void* entropy;        // Acc (tokens,), or null
    void* grad_logprobs;  // Acc (tokens, width), or null: d logprob / d hidden
    void* grad_entropy;   // Acc (tokens, width), or null: d entropy / d hidden
    void* stats;          // Acc (tokens, 5): shift, others, target, slope, mean (fastalign/ops/head/epilogue.py)
    // Acc (tokens, 3), or null: the mean of the logits, log sum_j p_j^2, and 1 where the target is the first of the
    // largest logits, else 0.
    void* details;
    // Null for linear_logprobs. For sparse_divergence it receives the targets' logits, Acc (tokens, targets_per_token).
    // Then stats is Acc (tokens, 2) with shift and others, grad_logprobs receives the mean of dz/du W over all entries
    // except the targets, and there is no other result and no cache.
    void* picked;
};

struct BackwardProblem : HeadProblem {
    const void* grad_logprobs;  // Acc (tokens,)
    const void* grad_entropy;   // Acc (tokens,), or null
    const void* stats;
    void* d_hidden;             // Acc (tokens, width), zeroed, or null
    void* d_weight;             // dtype (vocab, width) contiguous, or null
    void* d_bias;               // Acc (vocab,), or null
    // Null for linear_logprobs. For sparse_divergence it is the gradient in the targets' u, Acc (tokens,
    // targets_per_token). Then grad_logprobs is the gradient in the logarithm of the sum over all other entries, and
    // stats are those of its forward pass.
    const void* grad_targets;
};

// Rows of logits and their targets. Row r begins at r / inner * outer_stride + r % inner * inner_stride.
struct SelectiveProblem {
    DType dtype;                  // of the logits and their gradient
    const void* logits;           // unit stride along the vocabulary; overwritten by backward if d_logits is null
    std::int64_t inner, inner_stride, outer_stride;
    const std::int64_t* targets;  // (rows,)
    std::int64_t rows, vocab, ignore_index;
    double temperature;
    void* logprobs;               // Acc (rows,), forward
    void* stats;                  // Acc (rows, 2): shift, others (fastalign/ops/selective_logprobs.py)
    const void* grad;             // Acc (rows,), backward
    void* d_logits;               // dtype (rows, vocab) contiguous, or null
    std::size_t cache_bytes;      // size of the caches: a larger gradient is written past them
};

enum class Divergence : int { forward_kl, reverse_kl, jsd };  // as in reference.DIVERGENCES

// Student and teacher have the same dtype, rows, scored and vocab. Neither has targets or a cache.
struct DivergenceProblem {
    DType dtype;
    HeadProblem student, teacher;
    Divergence kind;
    double beta;         // weight of the teacher in the mixture of the jsd
    std::int64_t budget;  // bytes of logits held at a time
    void* values;        // Acc (tokens,)
    void* grad_hidden;   // Acc (tokens, width), or null: d value / d hidden
    void* stats;         // Acc (tokens, 5): both sides' maximum and log-sum, and K (fastalign/ops/head)
    // The gradient of sum(coefficients * values) in the student's weight and bias is added to d_weight and d_bias.
    const void* coefficients;  // Acc (tokens,), or null if the next two are null
    void* d_weight;            // Acc (vocab, width rounded up to a multiple of the panel), or null
    void* d_bias;              // Acc (vocab, lanes of a vector): the caller sums the lanes; or null
};

// F += sum_s (G_s' X_s)^2, where sequence s is the rows offsets[s] to offsets[s + 1] - 1.
struct FisherProblem {
    DType dtype;              // of grad_output and input
    void* fisher;             // Acc (out, in), unit column stride
    std::int64_t fisher_stride;
    const void* grad_output;  // G (tokens, out), unit column stride
    std::int64_t grad_stride;
    const void* input;        // X (tokens, in), unit column stride
    std::int64_t input_stride;
    const std::int64_t* offsets;  // (sequences + 1,)
    std::int64_t sequences, out, in;
};

// One contiguous tensor of an EWC penalty.
struct EwcTensor {
    std::int64_t size;
    const void* parameter;  // dtype
    const void* anchor;     // anchor_dtype
    const void* fisher;     // Acc, or null for 1 everywhere
    void* grad;             // dtype, or null
    bool fresh;             // true: write grad; false: add to it
};

struct EwcProblem {
    DType dtype, anchor_dtype;  // anchor_dtype is dtype or Acc
    double strength;            // the gradient is strength * F (theta - theta0)
    std::vector<EwcTensor> tensors;
};

// Rows of a root-mean-square norm. All tensors are contiguous and of the same dtype. If `grad` is not null this is the
// backward pass.
struct RmsNormProblem {
    DType dtype;
    std::int64_t rows, width;
    double eps;
    const void* x;       // (rows, width)
    const void* weight;  // (width,)
    void* scale;         // Acc (rows,): 1 / sqrt(mean(x^2) + eps), written by forward and read by backward
    const void* grad;    // (rows, width), or null
    void* out;           // (rows, width): the norm, or the gradient in x
};

// silu(gate) * up, elementwise. All tensors are contiguous and of the same dtype. If `grad` is not null this is the
// backward pass.
struct GatedProblem {
    DType dtype;
    std::int64_t size;
    const void *gate, *up;
    void* out;                // null in backward
    const void* grad;         // gradient in out, or null
    void *d_gate, *d_up;      // results of backward
};

// A tensor (heads, tokens, width) with unit stride along the width. The other strides are in elements.
struct Heads {
    const void* at;
    std::int64_t head, token;
};

// Attention of one packed row. Results are contiguous. If `grad.at` is not null this is the backward pass.
struct AttentionProblem {
    DType dtype;
    std::int64_t heads, key_heads, width, value_width;
    Heads query, key, value, grad;  // grad is that of the output
    // (count, 4): first token and length of a segment, first token and length of its prefix. A segment without a prefix
    // begins a group. The prefix of every other segment lies in the first segment of its group.
    const std::int64_t* segments;
    std::int64_t count;
    double scaling;
    std::int64_t window;  // how many keys a query sees at most, its own included
    void* out;            // (tokens, heads, value_width), written by forward and read by backward
    void* log_sums;       // Acc (tokens, heads), likewise: log of the sum of a query's exponentiated scores
    void *d_query, *d_key, *d_value;  // (tokens, heads or key_heads, width or value_width), results of backward
};

}  // namespace fastalign
