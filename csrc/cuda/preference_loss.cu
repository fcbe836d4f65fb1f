// Losses of pairs (or of labelled completions) from token log-probs in one launch. A block sums the two sequences of a
// pair, computes loss, rewards and derivatives, and writes the coefficient of each token. Sums and formulas are in
// double, and the order of a sum depends only on the length of the sequence. The formulas are those of
// fastalign/losses. fastalign/ops/preference_loss.py turns the options into three numbers. Only some thousand tokens
// are read, so the time is that of a launch, and one launch is what matters.
//
// Offsets that do not ascend from 0 to the number of tokens cause no access outside the tensors. Their sums, and
// therefore the losses, are NaN.

#include "device.h"

namespace fastalign::cuda {
namespace {

constexpr int kLossThreads = 128;

__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }
__device__ __forceinline__ double sigmoid(double x) { return 1 / (1 + exp(-x)); }

// The tokens [begin, end) of a sequence, empty if its offsets are wrong.
struct Span {
    std::int64_t begin, end;
    bool right;
};

__device__ __forceinline__ Span span_of(const Preference& p, std::int64_t i) {
    const std::int64_t begin = p.offsets[i], end = p.offsets[i + 1];
    bool right = 0 <= begin && begin <= end && end <= p.tokens;
    if (i == 0) right = right && begin == 0;
    if (i == p.sequences - 1) right = right && end == p.tokens;
    return {begin, right ? end : begin, right};
}

// The number of tokens to average sequence i over, at least 1, so that the average of an empty completion is 0.
__device__ __forceinline__ double length_of(const Preference& p, std::int64_t i, Span span) {
    if (!p.averaged) return 1;
    return fmax(1.0, p.lengths ? double(p.lengths[i]) : double(span.end - span.begin));
}

// Sums one sequence, writes its sum and reward, and returns in all threads the number that enters the loss.
__device__ __forceinline__ double ratio_of(const Preference& p, std::int64_t i, Span span, double* shared) {
    double sum = 0;
    for (std::int64_t t = span.begin + threadIdx.x; t < span.end; t += blockDim.x) sum += p.logprobs[t];
    sum = block_reduced(sum, 0.0, shared, Add{});
    if (!span.right) sum = NAN;
    const double ratio = sum - (p.ref_sums ? double(p.ref_sums[i]) : 0.0);
    if (threadIdx.x == 0) p.sums[i] = float(sum), p.rewards[i] = float(p.beta * ratio);
    return ratio / length_of(p, i, span);
}

struct LossAndSlopes {
    double loss, chosen, rejected;
};

__device__ LossAndSlopes pair_loss(const Preference& p, double u, double v) {
    if (p.form == LossForm::odds_ratio) {
        // The log odds of a completion are u - log(1 - e^u), with the derivative -1 / expm1(u).
        // An average log-prob that was rounded to 0 counts as the largest number below 0, and has no gradient.
        const double highest = -FLT_MIN, a = u < highest ? u : highest, b = v < highest ? v : highest;
        const double log_odds_ratio = (a - log(-expm1(a))) - (b - log(-expm1(b)));
        const double slope = p.scale * sigmoid(-log_odds_ratio);
        return {p.scale * softplus(-log_odds_ratio) + 0 * (u + v), u > highest ? 0 : slope / expm1(a),
                v > highest ? 0 : -slope / expm1(b)};  // the term 0 * (u + v) above keeps a NaN
    }
    const double x = p.scale * (u - v) - p.offset;
    double loss, slope;  // slope is d loss / d x
    if (p.form == LossForm::square) {
        loss = x * x, slope = 2 * x;
    } else if (p.form == LossForm::hinge) {
        loss = x < 0 || x != x ? -x : 0, slope = x < 0 ? -1 : 0;
    } else {
        // Label smoothing: (1 - eps) softplus(-x) + eps softplus(x) = softplus(-x) + eps x, with eps as the slope.
        loss = softplus(-x) + p.slope * x, slope = p.slope - sigmoid(-x);
    }
    return {loss, slope * p.scale, -slope * p.scale};
}

__device__ LossAndSlopes labelled_loss(const Preference& p, double u, bool desirable) {
    const double x = desirable ? p.scale * u : -p.scale * u, weight = desirable ? p.offset : p.slope;
    const double falling = weight * sigmoid(-x) * sigmoid(x) * p.scale;
    return {weight * sigmoid(-x), desirable ? -falling : falling, 0};
}

__device__ __forceinline__ void spread(const Preference& p, Span span, double slope) {
    for (std::int64_t t = span.begin + threadIdx.x; t < span.end; t += blockDim.x) p.coefficients[t] = float(slope);
}

// budget: 64 registers, 80 bytes shared
__global__ void __launch_bounds__(kLossThreads) loss_kernel(Preference p) {
    __shared__ double first_sums[kLossThreads / 32], second_sums[kLossThreads / 32], slopes[2];
    const std::int64_t item = blockIdx.x;
    const bool pairs = p.form != LossForm::kto;
    const std::int64_t first = pairs && p.alternating ? 2 * item : item;
    const std::int64_t second = !pairs ? item : p.alternating ? 2 * item + 1 : item + p.items;
    const Span one = span_of(p, first), two = span_of(p, second);
    const double u = ratio_of(p, first, one, first_sums), v = pairs ? ratio_of(p, second, two, second_sums) : 0;
    if (threadIdx.x == 0) {
        const LossAndSlopes of = pairs ? pair_loss(p, u, v) : labelled_loss(p, u - p.kl[0], p.labels[first]);
        p.losses[item] = float(of.loss);
        slopes[0] = of.chosen, slopes[1] = of.rejected;
    }
    __syncthreads();
    spread(p, one, slopes[0] / length_of(p, first, one));
    if (pairs) spread(p, two, slopes[1] / length_of(p, second, two));
}

// grad[t] = grad_losses[item of t] * coefficients[t] + grad_sums[sequence of t]
// budget: 32 registers, 0 bytes shared
__global__ void __launch_bounds__(kLossThreads) backward_kernel(Preference p) {
    const std::int64_t i = blockIdx.x;
    const std::int64_t item = p.items == p.sequences ? i : p.alternating ? i / 2 : i % p.items;
    const Span span = span_of(p, i);
    const float scale = p.grad_losses ? p.grad_losses[item] : 0.0f, shift = p.grad_sums ? p.grad_sums[i] : 0.0f;
    for (std::int64_t t = span.begin + threadIdx.x; t < span.end; t += blockDim.x)
        p.grad[t] = scale * p.coefficients[t] + shift;
}

}  // namespace

int preference_loss(const Preference& p, Where where) {
    return p.items ? launch(where, loss_kernel, dim3(p.items), kLossThreads, p) : cudaSuccess;
}

int preference_loss_backward(const Preference& p, Where where) {
    return p.sequences ? launch(where, backward_kernel, dim3(p.sequences), kLossThreads, p) : cudaSuccess;
}

}  // namespace fastalign::cuda
