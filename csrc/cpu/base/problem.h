#pragma once

// What crosses the border between Python and the kernels: plain structs of raw pointers, shapes and options. Python
// has checked every shape, dtype and target.

#include <cstdint>
#include <vector>

namespace fastalign {

enum class DType : int { f32, f64, bf16, f16 };

// The linear head and its scored rows. "Acc" is float, or double for f64 tensors.
struct HeadProblem {
    DType dtype;                  // of hidden, weight and cache
    const void* hidden;           // (tokens, width), unit column stride
    std::int64_t hidden_stride;   // elements between rows
    const void* weight;           // (vocab, width), unit column stride
    std::int64_t weight_stride;
    const void* bias;             // Acc (vocab,), or null
    const std::int64_t* targets;  // (tokens, targets_per_token), rising in a row: entries that stay out of the sums
    std::int64_t targets_per_token = 1;
    const std::int64_t* rows;     // (scored,) which tokens are scored, or null for all of them
    std::int64_t scored, vocab, width;
    double logit_scale, softcap, temperature;  // softcap 0: none
    void* cache;                  // (cache_rows / panel, vocab, panel): exp(z - shift) * slope, or null
    void* shifts;                 // Acc (cache_rows / panel, tiles, panel)
    std::int64_t cache_rows;      // a multiple of the panel
};

// Results lie by token; tokens that are not scored are left as they are (the caller zeroes them).
struct ForwardProblem : HeadProblem {
    void* logprobs;       // Acc (tokens,)
    void* entropy;        // Acc (tokens,), or null
    void* grad_logprobs;  // Acc (tokens, width), or null: d logprob / d hidden
    void* grad_entropy;   // Acc (tokens, width), or null: d entropy / d hidden
    void* stats;          // Acc (tokens, 5): shift, others, target, slope, mean; as in fastalign/ops/tiles.py
    // sparse_divergence instead: the targets' logits, Acc (tokens, targets_per_token), with stats Acc (tokens, 2) shift
    // and others, and in grad_logprobs the mean of dz/du W over the others; no other result, and no cache. Else null.
    void* picked;
};

struct BackwardProblem : HeadProblem {
    const void* grad_logprobs;  // Acc (tokens,)
    const void* grad_entropy;   // Acc (tokens,), or null
    const void* stats;
    void* d_hidden;             // Acc (tokens, width), zeroed, or null
    void* d_weight;             // dtype (vocab, width) contiguous, or null
    void* d_bias;               // Acc (vocab,), or null
    // sparse_divergence instead: the gradient in the targets' u, Acc (tokens, targets_per_token); grad_logprobs is that
    // in the logarithm of the others' sum, and stats are its forward pass's. Else null.
    const void* grad_targets;
};

// Rows of logits and their targets; row r begins at r / inner * outer_stride + r % inner * inner_stride.
struct SelectiveProblem {
    DType dtype;                  // of the logits and their gradient
    const void* logits;           // unit stride along the vocabulary; overwritten where d_logits is null
    std::int64_t inner, inner_stride, outer_stride;
    const std::int64_t* targets;  // (rows,)
    std::int64_t rows, vocab, ignore_index;
    double temperature;
    void* logprobs;               // Acc (rows,), forward
    void* stats;                  // Acc (rows, 2): shift, others; as in fastalign/ops/selective_logprobs.py
    const void* grad;             // Acc (rows,), backward
    void* d_logits;               // dtype (rows, vocab) contiguous, or null
    std::size_t cache_bytes;      // a larger gradient does not stay in any cache
};

enum class Divergence : int { forward_kl, reverse_kl, jsd };  // as in reference.DIVERGENCES

// Both sides have the same dtype, rows, scored and vocab; neither has targets or a cache.
struct DivergenceProblem {
    DType dtype;
    HeadProblem student, teacher;
    Divergence kind;
    double beta;         // of the jsd
    std::int64_t budget;  // bytes of logits held at a time
    void* values;        // Acc (tokens,)
    void* grad_hidden;   // Acc (tokens, width), or null: d value / d hidden
    void* stats;         // Acc (tokens, 5): as in fastalign/ops/divergence_tiles.py
    // The gradient of sum(coefficients * values) in the student's weight and bias, added to what is there.
    const void* coefficients;  // Acc (tokens,), or null without the next two
    void* d_weight;            // Acc (vocab, width up to a multiple of the panel), or null
    void* d_bias;              // Acc (vocab, lanes of a vector), to be summed, or null
};

// F += sum_s (G_s' X_s)^2, sequence s being the rows offsets[s] to offsets[s + 1].
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

// One contiguous tensor under EWC.
struct EwcTensor {
    std::int64_t size;
    const void* parameter;  // dtype
    const void* anchor;     // anchor_dtype
    const void* fisher;     // Acc, or null: 1 everywhere
    void* grad;             // dtype, or null
    bool fresh;             // grad is written, not added to
};

struct EwcProblem {
    DType dtype, anchor_dtype;  // the same, or the second is Acc
    double strength;            // the gradient is strength * F (theta - theta0)
    std::vector<EwcTensor> tensors;
};

// Rows of a root-mean-square norm; everything contiguous and of the same dtype. Backward where there is a gradient.
struct RmsNormProblem {
    DType dtype;
    std::int64_t rows, width;
    double eps;
    const void* x;       // (rows, width)
    const void* weight;  // (width,)
    void* scale;         // Acc (rows,): 1 / sqrt(mean(x^2) + eps), out of forward and into backward
    const void* grad;    // (rows, width), or null
    void* out;           // (rows, width): the norm, or the gradient in x
};

// silu(gate) * up, entry by entry; everything contiguous and of the same dtype. Backward where there is a gradient.
struct GatedProblem {
    DType dtype;
    std::int64_t size;
    const void *gate, *up;
    void* out;                // or null in backward
    const void* grad;         // or null
    void *d_gate, *d_up;      // of backward
};

// (heads, tokens, width), unit stride along the width; strides in elements.
struct Heads {
    const void* at;
    std::int64_t head, token;
};

// Attention of one packed row. Results are contiguous. Backward where there is a gradient.
struct AttentionProblem {
    DType dtype;
    std::int64_t heads, key_heads, width, value_width;
    Heads query, key, value, grad;  // grad of the output, or null
    // (count, 4): first token and length of a segment, and of its prefix. One without a prefix begins a group; a prefix
    // lies in the first segment of its group.
    const std::int64_t* segments;
    std::int64_t count;
    double scaling;
    std::int64_t window;  // how many keys a query sees at most, itself among them
    void* out;            // (tokens, heads, value_width), out of forward and into backward
    void* log_sums;       // Acc (tokens, heads), likewise: of the exponentials of a query's scores
    void *d_query, *d_key, *d_value;  // (tokens, heads or key_heads, width or value_width), of backward
};

}  // namespace fastalign
