// Both passes over rows that start anywhere, with targets inside, outside and ignored.
#include "selective_logprobs.cu"

#include "check.h"

constexpr int kRows = 5, kStride = 1051;
const std::int64_t kTargets[kRows] = {0, -100, 1049, std::int64_t(1) << 40, -7};

template <typename T>
void check(int vocab, std::size_t shift) {
    Tensor<T> logits((kRows - 1) * kStride + vocab, shift), out((kRows - 1) * kStride + vocab, 0);
    Tensor<float> logprobs(kRows), stats(2 * kRows), grad(kRows);
    Tensor<std::int64_t> targets(kRows);
    logits.fill_normal(), grad.fill_normal();
    for (int i = 0; i < kRows; ++i) targets.data()[i] = kTargets[i] < kStride && kTargets[i] >= vocab ? vocab - 1 : kTargets[i];
    Gather p = {};
    p.dtype = kDType<T>, p.logits = logits.data(), p.stride = kStride, p.targets = targets.data();
    p.rows = kRows, p.vocab = vocab, p.ignore_index = -100, p.factor = 0.7f;
    p.logprobs = logprobs.data(), p.stats = stats.data(), p.grad = grad.data();
    expect(selective_logprobs(p, {}));
    p.grad_logits = out.data(), p.grad_stride = kStride;
    expect(selective_logprobs_backward(p, {}));
    p.grad_logits = logits.data();
    expect(selective_logprobs_backward(p, {}));
}

int main() {
    check<float>(1050, 1);
    check<bf16>(1050, 3);
    check<fp16>(31, 0);
    check<bf16>(3, 7);
}
