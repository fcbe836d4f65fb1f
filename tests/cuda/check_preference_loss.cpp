// Pairs in turn and in halves, labelled completions, empty sequences, and offsets that lie.
#include "preference_loss.cu"

#include "check.h"

constexpr int kTokens = 700;

void check(LossForm form, bool alternating, bool averaged, std::vector<std::int64_t> offsets) {
    const std::int64_t sequences = static_cast<std::int64_t>(offsets.size()) - 1;
    const std::int64_t items = form == LossForm::kto ? sequences : sequences / 2;
    Tensor<float> logprobs(kTokens), reference(sequences), kl(1), losses(items), rewards(sequences), sums(sequences);
    Tensor<float> coefficients(kTokens), grad_losses(items), grad_sums(sequences), grad(kTokens);
    std::vector<char> labels(sequences, 1);
    logprobs.fill_normal(), reference.fill_normal(), grad_losses.fill_normal();
    Preference p = {};
    p.logprobs = logprobs.data(), p.offsets = offsets.data(), p.ref_sums = reference.data(), p.kl = kl.data();
    p.labels = reinterpret_cast<const bool*>(labels.data()), p.tokens = kTokens, p.sequences = sequences;
    p.items = items, p.form = form, p.averaged = averaged, p.alternating = alternating, p.beta = p.scale = 0.1;
    p.losses = losses.data(), p.rewards = rewards.data(), p.sums = sums.data(), p.coefficients = coefficients.data();
    expect(preference_loss(p, {}));
    p.grad_losses = grad_losses.data(), p.grad_sums = grad_sums.data(), p.grad = grad.data();
    expect(preference_loss_backward(p, {}));
}

int main() {
    check(LossForm::logistic, true, false, {0, 300, 301, 301, 700});
    check(LossForm::odds_ratio, false, true, {0, 300, 301, 301, 700});
    check(LossForm::kto, false, false, {0, 300, 700});
    check(LossForm::hinge, true, true, {5, -300, 900, std::int64_t(1) << 40, 3});
}
