#pragma once

// Preference losses from token log-probs in one pass. It computes the sum of each sequence, the loss of each pair (or
// of each labelled completion), the rewards, and d loss / d logprob of each token. Intermediate results are in double.
// The formulas are those of fastalign/losses. fastalign/ops/preference_loss.py turns the options into three numbers.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace fastalign {

enum class LossForm : int { logistic, square, hinge, odds_ratio, kto };  // Form of fastalign/ops/preference_loss.py

struct PreferenceProblem {
    const void* logprobs;         // T (tokens,)
    const std::int64_t* offsets;  // (sequences + 1,) into the tokens
    const void* ref_sums;         // T (sequences,), or null for 0
    const void* lengths;          // T (sequences,) tokens to average over, or null for the lengths from the offsets
    const bool* labels;           // (sequences,) for kto
    const void* kl;               // T (1,) for kto
    std::int64_t tokens, sequences;
    LossForm form;
    bool averaged;     // whether the loss uses averages per token; rewards and sums are always sums
    bool alternating;  // true: chosen and rejected alternate; false: all chosen come first, then all rejected
    double beta, scale, offset, slope;
    void *losses, *rewards, *sums, *coefficients;  // T (items,), (sequences,), (sequences,), (tokens,)
};

// Whether the offsets ascend from 0 to `tokens`.
inline bool offsets_fit(const std::int64_t* offsets, std::int64_t sequences, std::int64_t tokens) {
    if (offsets[0] != 0 || offsets[sequences] != tokens) return false;
    for (std::int64_t i = 0; i < sequences; ++i)
        if (offsets[i] > offsets[i + 1]) return false;
    return true;
}

inline double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }
inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// A loss, and its derivatives in the log-probabilities of the chosen and the rejected completion.
struct LossAndSlopes {
    double loss, chosen, rejected;
};

// `u` and `v` are the log-ratios of chosen and rejected to the reference, or their log-probs if there is no reference.
inline LossAndSlopes pair_loss(const PreferenceProblem& p, double u, double v, double tiny) {
    if (p.form == LossForm::odds_ratio) {
        // An average log-prob that was rounded to 0 counts as the largest number below 0, and has no gradient.
        const double a = std::min(u, -tiny), b = std::min(v, -tiny);
        const double log_odds_ratio = (a - std::log(-std::expm1(a))) - (b - std::log(-std::expm1(b)));
        const double slope = p.scale * sigmoid(-log_odds_ratio);
        return {p.scale * softplus(-log_odds_ratio), u > -tiny ? 0 : slope / std::expm1(a),
                v > -tiny ? 0 : -slope / std::expm1(b)};
    }
    const double x = p.scale * (u - v) - p.offset;
    double loss, slope;  // slope is d loss / d x
    switch (p.form) {
        case LossForm::square: loss = x * x, slope = 2 * x; break;
        case LossForm::hinge: loss = std::max(-x, 0.0), slope = x < 0 ? -1 : 0; break;
        default: loss = softplus(-x) + p.slope * x, slope = p.slope - sigmoid(-x);
    }
    return {loss, slope * p.scale, -slope * p.scale};
}

// `u` is the log-ratio of a labelled completion minus the baseline. p.offset and p.slope are the weights of desirable
// and of undesirable completions.
inline LossAndSlopes labelled_loss(const PreferenceProblem& p, double u, bool desirable) {
    const double x = desirable ? p.scale * u : -p.scale * u, weight = desirable ? p.offset : p.slope;
    const double falling = weight * sigmoid(-x) * sigmoid(x) * p.scale;
    return {weight * sigmoid(-x), desirable ? -falling : falling, 0};
}

template <typename T>
struct PreferencePass {
    const PreferenceProblem& p;
    template <typename V>
    static T* as(V* address) { return static_cast<T*>(address); }

    std::int64_t span(std::int64_t i) const { return p.offsets[i + 1] - p.offsets[i]; }
    double length(std::int64_t i) const {  // at least 1, so that the average of an empty completion is 0
        if (!p.averaged) return 1;
        return std::max(1.0, p.lengths ? static_cast<const T*>(p.lengths)[i] : static_cast<double>(span(i)));
    }
    // Sums one sequence, writes its sum and reward, and returns the number that enters the loss.
    double ratio(std::int64_t i) const {
        double sum = 0;
        for (std::int64_t j = p.offsets[i]; j < p.offsets[i + 1]; ++j) sum += static_cast<const T*>(p.logprobs)[j];
        const double of_reference = p.ref_sums ? static_cast<const T*>(p.ref_sums)[i] : 0.0;
        as(p.sums)[i] = static_cast<T>(sum);
        as(p.rewards)[i] = static_cast<T>(p.beta * (sum - of_reference));
        return (sum - of_reference) / length(i);
    }
    void spread(std::int64_t i, double slope) const {
        std::fill_n(as(p.coefficients) + p.offsets[i], span(i), static_cast<T>(slope / length(i)));
    }
    void run() const {
        if (p.form == LossForm::kto) {
            const double kl = *static_cast<const T*>(p.kl);
            for (std::int64_t i = 0; i < p.sequences; ++i) {
                const LossAndSlopes of = labelled_loss(p, ratio(i) - kl, p.labels[i]);
                as(p.losses)[i] = static_cast<T>(of.loss);
                spread(i, of.chosen);
            }
            return;
        }
        const std::int64_t pairs = p.sequences / 2;
        for (std::int64_t b = 0; b < pairs; ++b) {
            const std::int64_t chosen = p.alternating ? 2 * b : b, rejected = p.alternating ? 2 * b + 1 : b + pairs;
            const double u = ratio(chosen), v = ratio(rejected);
            const LossAndSlopes of = pair_loss(p, u, v, std::numeric_limits<T>::min());
            as(p.losses)[b] = static_cast<T>(of.loss);
            spread(chosen, of.chosen);
            spread(rejected, of.rejected);
        }
    }
};

// out[t] = grad_losses[item of t] * coefficients[t] + grad_sums[sequence of t]. Either gradient may be null.
template <typename T>
void preference_loss_backward(const T* grad_losses, const T* grad_sums, const T* coefficients,
                              const std::int64_t* offsets, std::int64_t sequences, std::int64_t items,
                              bool alternating, T* out) {
    for (std::int64_t i = 0; i < sequences; ++i) {
        const std::int64_t item = items == sequences ? i : alternating ? i / 2 : i % items;
        const T scale = grad_losses ? grad_losses[item] : T(0), shift = grad_sums ? grad_sums[i] : T(0);
        for (std::int64_t j = offsets[i]; j < offsets[i + 1]; ++j) out[j] = scale * coefficients[j] + shift;
    }
}

}  // namespace fastalign
