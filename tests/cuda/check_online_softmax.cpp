// Tiles whose rows start anywhere, results in their own memory and apart, every option at once and few.
#include "online_softmax.cu"

#include "check.h"

constexpr int kRows = 4, kWidth = 10, kStride = 1100;
const std::int64_t kTargets[kRows] = {0, 1039, std::int64_t(1) << 40, -100};

template <typename U, typename E>
void check(int columns, std::size_t shift, bool everything) {
    const std::size_t cells = (kRows - 1) * kStride + columns;
    Tensor<U> u(cells, shift);
    Tensor<E> e(cells, shift);
    Tensor<float> bias(columns), a(kRows * kWidth, shift), b(kRows * kWidth, shift), sums(5 * kRows);
    Tensor<std::int64_t> targets(kRows), index(kRows);
    u.fill_normal(), bias.fill_normal();
    for (int i = 0; i < kRows; ++i) targets.data()[i] = kTargets[i];
    Absorb p = {};
    p.from = kDType<U>, p.to = kDType<E>, p.u = u.data(), p.u_stride = kStride, p.targets = targets.data();
    p.rows = kRows, p.columns = columns, p.head.factor = 1;
    p.shift = sums.data(), p.others = p.shift + kRows, p.target = p.shift + 2 * kRows;
    p.e = u.data(), p.e_stride = kStride * sizeof(U) / sizeof(E);
    p.a = a.data(), p.a_stride = p.width = kWidth;
    if (everything) {
        p.bias = bias.data(), p.head.inner = 0.1f, p.head.outer = 20.0f, p.zothers = p.shift + 3 * kRows;
        p.best = p.shift + 4 * kRows, p.best_index = index.data();
        p.ze = p.e, p.ze_stride = p.e_stride, p.e = e.data(), p.e_stride = kStride;
        p.b = b.data(), p.b_stride = kWidth;
    }
    for (int i = 0; i < kRows; ++i) p.shift[i] = i % 2 ? kStart : -50;
    expect(absorb(p, {}));
}

int main() {
    check<float, bf16>(1040, 0, false);
    check<bf16, bf16>(37, 1, false);
    check<float, bf16>(1040, 0, true);
    check<float, float>(1040, 1, true);
    check<bf16, bf16>(37, 1, true);
}
