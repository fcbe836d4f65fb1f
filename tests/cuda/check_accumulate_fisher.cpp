// Tiles that F does not fill, rows that start anywhere, sequences empty, short and long, and offsets that lie.
#include "accumulate_fisher.cu"

#include "check.h"

constexpr int kTokens = 45;

template <typename T>
void check(int out, int in, std::size_t shift, std::vector<std::int64_t> offsets) {
    Tensor<T> grad(kTokens * out, shift), input(kTokens * in, shift);
    Tensor<float> fisher(out * in, shift);
    grad.fill_normal(), input.fill_normal();
    Fisher p = {};
    p.dtype = kDType<T>, p.fisher = fisher.data(), p.grad_output = grad.data(), p.input = input.data();
    p.fisher_stride = in, p.grad_stride = out, p.input_stride = in, p.offsets = offsets.data();
    p.tokens = kTokens, p.sequences = static_cast<std::int64_t>(offsets.size()) - 1, p.out = out, p.in = in;
    expect(accumulate_fisher(p, {}));
}

int main() {
    check<bf16>(136, 8, 0, {0, 0, 1, 38, 38, 45});
    check<fp16>(5, 67, 1, {2, 40});
    check<float>(9, 8, 0, {0, 30, 20, std::int64_t(1) << 40});
}
