// Tensors of odd sizes, unaligned, of several blocks and of none.
#include "ewc.cu"

#include "check.h"

template <typename T, typename A>
void check(std::vector<int> sizes, std::size_t shift) {
    std::vector<Tensor<T>> thetas, grads;
    std::vector<Tensor<A>> anchors;
    std::vector<Tensor<float>> fishers;
    std::vector<HeldTensor> tensors;
    std::int64_t blocks = 0;
    for (const int size : sizes) {
        thetas.emplace_back(size, shift), grads.emplace_back(size, shift), anchors.emplace_back(size, shift);
        fishers.emplace_back(size, shift);
        thetas.back().fill_normal(), blocks += held_blocks(size);
    }
    for (std::size_t i = 0; i < sizes.size(); ++i)
        tensors.push_back({thetas[i].data(), anchors[i].data(), fishers[i].data(), grads[i].data(), sizes[i], i % 2 == 0, 0});
    Tensor<double> sums(blocks);
    expect(ewc_penalty(kDType<T>, kDType<A>, 0.5f, tensors, sums.data(), {}));
}

int main() {
    check<float, float>({1, 0, 4097, 30}, 0);
    check<bf16, float>({5, 8}, 1);
    check<fp16, fp16>({3}, 0);
}
