// Gradients in the memory of their tile, from fresh products and from kept probabilities; every option and none, odd
// sizes and starts.
#include "softmax_gradient.cu"

#include "check.h"

constexpr int kRows = 4, kStride = 1100;
const std::int64_t kTargets[kRows] = {0, 1039, std::int64_t(1) << 40, -100};

template <typename U, typename D>
void check(int columns, std::size_t shift, bool everything) {
    const std::size_t cells = (kRows - 1) * kStride + columns;
    Tensor<U> u(cells, shift);
    Tensor<D> kept(cells, shift);
    Tensor<float> bias(columns), rows(5 * kRows);
    Tensor<std::int64_t> targets(kRows);
    u.fill_normal(), bias.fill_normal(), rows.fill_normal(), kept.fill_normal();
    for (int i = 0; i < kRows; ++i) targets.data()[i] = kTargets[i];
    Gradient p = {};
    p.from = kDType<U>, p.to = kDType<D>, p.u = u.data(), p.u_stride = kStride, p.targets = targets.data();
    p.rows = kRows, p.columns = columns, p.head.factor = 1;
    p.shift = rows.data(), p.mean = p.shift + kRows, p.logprobs = p.mean + kRows, p.target = p.logprobs + kRows;
    if (everything)
        p.bias = bias.data(), p.head.inner = 0.1f, p.head.outer = 20.0f, p.entropy = p.target + kRows;
    p.du = u.data(), p.du_stride = kStride * sizeof(U) / sizeof(D);
    expect(softmax_gradient(p, {}));
    p.from = p.to, p.u = kept.data();
    expect(kept_gradient(p, {}));
}

int main() {
    check<float, bf16>(1040, 0, true);
    check<float, bf16>(1040, 0, false);
    check<float, float>(1040, 1, true);
    check<bf16, bf16>(37, 1, true);
    check<bf16, bf16>(37, 1, false);
}
