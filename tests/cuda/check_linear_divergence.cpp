// All three steps of each divergence, on tiles whose rows start anywhere.
#include "linear_divergence.cu"

#include "check.h"

constexpr int kRows = 3;

template <typename T>
void check(DivergenceKind kind, int columns, int stride, std::size_t shift) {
    Tensor<float> a((kRows - 1) * stride + columns, shift), b((kRows - 1) * stride + columns, shift), bias(columns);
    Tensor<float> rows(4 * kRows), stats(5 * kRows);
    a.fill_normal(), b.fill_normal(), bias.fill_normal();
    Divergence p = {};
    p.kind = kind, p.beta = 0.3f, p.head = {1, 0.1f, 20.0f}, p.a = a.data(), p.b = b.data(), p.bias = bias.data();
    p.a_stride = p.b_stride = stride, p.rows = kRows, p.columns = columns;
    p.top = rows.data(), p.total = p.top + kRows, p.values = p.total + kRows, p.moments = p.values + kRows;
    p.stats = stats.data(), p.stats_stride = 5, p.c = a.data(), p.to = kDType<T>;
    p.c_stride = stride * sizeof(float) / sizeof(T);
    expect(divergence_normalise(p, {}));
    expect(divergence_terms(p, {}));
    expect(divergence_gradient(p, {}));
}

int main() {
    check<float>(DivergenceKind::forward_kl, 1040, 1040, 0);
    check<bf16>(DivergenceKind::reverse_kl, 1040, 1043, 1);
    check<fp16>(DivergenceKind::jsd, 37, 40, 0);
}
