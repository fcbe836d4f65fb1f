// The interface between bindings_cuda.cpp and the kernels, in plain C++: structs of raw addresses, shapes and options,
// and one function per kernel launch. Python (fastalign/ops/backends/cuda.py) has checked shapes, strides and dtypes
// before. The kernels check the targets, because only they read them. Every launcher returns a cudaError_t as int.
#pragma once

#include <cstdint>

namespace fastalign::cuda {

enum class DType : int { f32, bf16, f16 };

struct Where {
    int device;
    void* stream;  // a cudaStream_t
};

const char* error_string(int error);
#ifdef FASTALIGN_EMULATE_CUDA
long launches();  // the number of launches so far
void last_block_first(bool reversed);
#endif

// Log-probabilities of targets from logits that exist already (selective_logprobs.cu).
struct Gather {
    DType dtype;
    const void* logits;           // (rows, vocab), unit column stride
    std::int64_t stride;          // elements between rows
    const std::int64_t* targets;  // (rows,)
    std::int64_t rows, vocab, ignore_index;
    float factor;                 // 1 / temperature
    float* logprobs;              // (rows,) result of forward
    float* stats;                 // (rows, 2) logsumexp of all logits except the target's, and that logit minus it
    const float* grad;            // (rows,) for backward: the gradient in the log-probabilities
    void* grad_logits;            // (rows, vocab) like logits, and may be the same memory
    std::int64_t grad_stride;     // elements between rows of grad_logits
};
int selective_logprobs(const Gather& problem, Where where);
int selective_logprobs_backward(const Gather& problem, Where where);

// From products u to logits z. Without a cap (outer 0) z = factor (u + bias), else z = outer tanh(inner (u + bias)).
struct Head {
    float factor, inner, outer;
};

// A tile of products u = h W', and what turns them into logits. fastalign/ops/head/epilogue.py explains the interface.
struct Tile {
    DType from, to;               // `from` is that of u, `to` that of e, ze, du and kept tiles
    const void* u;                // (rows, columns), unit column stride; for kept_gradient the kept tile
    std::int64_t u_stride;        // elements between rows
    const std::int64_t* targets;  // (rows,) entries of the whole vocabulary
    std::int64_t first;           // the vocabulary entry of column 0
    std::int64_t rows, columns;   // columns <= 16384
    const float* bias;            // (columns,), or null
    Head head;
};

// Forward: adds a tile to the running sums (online_softmax.cu).
struct Absorb : Tile {
    float *shift, *others, *zothers, *target;  // (rows,) each, read and written; zothers is null without entropy
    void *e, *ze;                              // (rows, columns) in dtype `to`, or null
    std::int64_t e_stride, ze_stride;
    float *a, *b;                              // (rows, width), or null
    std::int64_t a_stride, b_stride, width;
    float* best;                               // (rows,) the largest logit, or null
    std::int64_t* best_index;                  // (rows,) the vocabulary entry of the largest logit
};
int absorb(const Absorb& problem, Where where);

// Forward, after the last tile: computes results and gradients from the sums (finish.cu).
struct Finish {
    DType dtype;                  // of the weight
    const void* weight;           // (vocab, width), unit column stride
    std::int64_t weight_stride;   // elements between rows
    const std::int64_t* targets;  // (rows,)
    std::int64_t rows, width;
    Head head;
    const float *shift, *others, *zothers, *target;  // (rows,) each, from absorb; zothers is null without entropy
    float *logprobs, *entropies;                     // (rows,) results
    float *at_target, *slope, *mean;                 // (rows,) results, see Stats in fastalign/ops/head/epilogue.py
    float *a, *b;                                    // (rows, width) sums that become gradients, or null
    std::int64_t a_stride, b_stride;
};
int finish(const Finish& problem, Where where);

// Backward: computes the gradient in u (softmax_gradient.cu).
struct Gradient : Tile {
    const float *shift, *mean, *logprobs, *entropy;  // (rows,) `Coefficients` of epilogue.py; entropy may be null
    const float* target;                             // (rows,) the gradient at the target's entry
    void* du;                                        // (rows, columns) in dtype `to`
    std::int64_t du_stride;
};
int softmax_gradient(const Gradient& problem, Where where);
int kept_gradient(const Gradient& problem, Where where);  // u is the kept tile, logprobs is its scale

// Losses of pairs or of labelled completions from token log-probs (preference_loss.cu).
enum class LossForm : int { logistic, square, hinge, odds_ratio, kto };  // Form in fastalign/ops/preference_loss.py
struct Preference {
    const float* logprobs;        // (tokens,)
    const std::int64_t* offsets;  // (sequences + 1,) into the tokens
    const float* ref_sums;        // (sequences,), or null for 0
    const float* lengths;         // (sequences,) tokens to average over, or null for the lengths from the offsets
    const bool* labels;           // (sequences,) for kto
    const float* kl;              // (1,) for kto
    std::int64_t tokens, sequences, items;  // an item is a pair, or a sequence for kto
    LossForm form;
    bool averaged, alternating;
    double beta, scale, offset, slope;
    float *losses, *rewards, *sums;  // (items,), (sequences,), (sequences,) results of forward
    float* coefficients;             // (tokens,) d loss / d logprob
    const float *grad_losses, *grad_sums;  // (items,), (sequences,) for backward; either may be null
    float* grad;                           // (tokens,) result of backward
};
int preference_loss(const Preference& problem, Where where);
int preference_loss_backward(const Preference& problem, Where where);

// F += the sum over sequences of the squared gradient in the weight of a linear layer (accumulate_fisher.cu).
struct Fisher {
    DType dtype;                  // of grad_output and input
    float* fisher;                // (out, in), unit column stride, like the next two
    const void* grad_output;      // (tokens, out)
    const void* input;            // (tokens, in)
    std::int64_t fisher_stride, grad_stride, input_stride;
    const std::int64_t* offsets;  // (sequences + 1,) into the tokens
    std::int64_t tokens, sequences, out, in;
    bool fisher_vectors, grad_vectors, input_vectors;  // whether rows allow 16-byte accesses; the launcher sets them
};
int accumulate_fisher(Fisher problem, Where where);

// Tiles of logits of student and teacher that are held in memory (linear_divergence.cu).
// fastalign/ops/head/divergence_tiles.py explains why, and divergence_terms.py beside it is the definition.
enum class DivergenceKind : int { forward_kl, reverse_kl, jsd };
struct Divergence {
    DivergenceKind kind;
    float beta;                       // weight of the teacher in the mixture of the jsd
    Head head;                        // divergence_normalise: of the side whose products a are; else of the student
    float *a, *b;                     // (rows, columns), unit column stride: student and teacher
    std::int64_t a_stride, b_stride, rows, columns;  // columns <= 8192
    const float* bias;                // (columns,), or null
    float *top, *total;               // (rows,) running maximum and sum of exponentials
    const float* stats;               // (rows, 4 or more): maximum and log-sum of student, then of teacher
    std::int64_t stats_stride;
    float *values, *moments;          // (rows,) divergence and K, to which a tile is added
    float scale;
    const float* coefficients;        // (rows,), or null for 1
    void* c;                          // (rows, columns) in dtype `to`
    DType to;
    std::int64_t c_stride;
};
int divergence_normalise(const Divergence& problem, Where where);
int divergence_terms(const Divergence& problem, Where where);
int divergence_gradient(const Divergence& problem, Where where);

}  // namespace fastalign::cuda
