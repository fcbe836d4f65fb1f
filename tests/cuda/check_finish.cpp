// Every result and gradient, and none; more columns than threads, rows that begin anywhere.
#include "finish.cu"

#include "check.h"

template <typename W>
void check(int width, std::size_t shift, bool everything) {
    constexpr int rows = 3, vocab = 5, stride = 301;
    Tensor<W> weight((vocab - 1) * stride + width, shift);
    Tensor<float> a((rows - 1) * stride + width, shift), b((rows - 1) * stride + width, shift), sums(9 * rows);
    Tensor<std::int64_t> targets(rows);
    weight.fill_normal(), a.fill_normal(), b.fill_normal();
    for (int i = 0; i < rows; ++i) targets.data()[i] = 2 * i;
    for (auto& value : sums.values) value = 1;
    Finish p = {};
    p.dtype = kDType<W>, p.weight = weight.data(), p.weight_stride = stride, p.targets = targets.data();
    p.rows = rows, p.head.factor = 1;
    float* at = sums.data();
    for (const float** in : {&p.shift, &p.others, &p.target}) *in = at, at += rows;
    for (float** out : {&p.logprobs, &p.entropies, &p.at_target, &p.slope, &p.mean}) *out = at, at += rows;
    if (everything) {
        p.zothers = at, p.head.inner = 0.1f, p.head.outer = 20.0f;
        p.width = width, p.a = a.data(), p.b = b.data(), p.a_stride = p.b_stride = stride;
    }
    expect(finish(p, {}));
}

int main() {
    check<bf16>(300, 0, true);
    check<float>(7, 1, true);
    check<fp16>(7, 1, false);
}
