// Log-probabilities of targets from logits that exist already, and their gradient, with one block per row. Forward
// reads the logits once, backward reads and writes them once. `others` is the log-sum-exp of all entries except the
// target y. With it no digits cancel near p_y = 1:
//
//     odds = z_y - others      log p_y = -log(1 + exp(-odds))      1 - p_y = 1 / (1 + exp(odds))
//
// Rows need not be aligned (with a vocabulary of 50257 in bfloat16 each row shifts by two bytes). A row is therefore
// read as a few single values, aligned packs of 16 bytes, and a few single values. A target outside the vocabulary
// causes no access outside the row: its log-probability is NaN and the gradient of its row is 0.

#include "device.h"

namespace fastalign::cuda {
namespace {

constexpr int kRowThreads = 512;

unsigned threads_for(std::int64_t vocab) {
    const std::int64_t wanted = (vocab / 16 + 31) / 32 * 32;
    return static_cast<unsigned>(wanted < 32 ? 32 : wanted > kRowThreads ? kRowThreads : wanted);
}

// budget: 32 registers, 128 bytes shared, 2 wide loads
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) gather_forward(Gather p) {
    __shared__ float maxima[kRowThreads / 32], sums[kRowThreads / 32];
    const std::int64_t row = blockIdx.x, target = p.targets[row];
    if (target == p.ignore_index) {  // such a row may contain anything, also NaN
        if (threadIdx.x == 0) p.logprobs[row] = p.stats[2 * row] = p.stats[2 * row + 1] = 0.0f;
        return;
    }
    const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
    const int vocab = static_cast<int>(p.vocab), head = unaligned_head(logits, vocab), thread = threadIdx.x;
    const int packs = (vocab - head) / kPack<T>, tail = head + packs * kPack<T>;
    SoftmaxSum mine;
    auto other = [&](float logit, int i) { return i == target ? kNegativeInfinity : logit * p.factor; };
    auto add_one = [&](int i) {
        const float z[1] = {other(to_float(logits[i]), i)};
        mine.add(z);
    };
    if (thread < head) add_one(thread);
    if (tail + thread < vocab) add_one(tail + thread);
#pragma unroll 2
    for (int pack = thread; pack < packs; pack += blockDim.x) {
        const int first = head + pack * kPack<T>;
        float z[kPack<T>];
        load_pack(logits + first, z);
#pragma unroll
        for (int i = 0; i < kPack<T>; ++i) z[i] = other(z[i], first + i);
        mine.add(z);
    }
    const float max = block_reduced(mine.max, kStart, maxima, Max{});
    const float sum = block_reduced(mine.sum * __expf(mine.max - max), 0.0f, sums, Add{});
    if (threadIdx.x == 0) {
        const bool inside = target >= 0 && target < p.vocab;
        const float log_sum = logf(fmaxf(sum, FLT_MIN));  // a sum of 0 means p_y = 1
        // A logit that overflowed to +infinity must not look like a certain target.
        const float z_y = inside ? to_float(logits[target]) * p.factor : INFINITY;
        const float odds = z_y < INFINITY || z_y != z_y ? (z_y - max) - log_sum : NAN;
        p.logprobs[row] = fminf(odds, 0.0f) - log1pf(__expf(-fabsf(odds)));
        p.stats[2 * row] = max + log_sum;
        p.stats[2 * row + 1] = odds;
    }
}

// grad (onehot - p) / temperature. The same thread reads and writes a value, so the result may overwrite the logits.
// budget: 32 registers, 0 bytes shared, 2 wide loads, 2 wide stores
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) gather_backward(Gather p) {
    const std::int64_t row = blockIdx.x, target = p.targets[row];
    const T* logits = static_cast<const T*>(p.logits) + row * p.stride;
    T* out = static_cast<T*>(p.grad_logits) + row * p.grad_stride;
    const bool scored = target != p.ignore_index && target >= 0 && target < p.vocab;
    const float others = p.stats[2 * row];
    const float miss = scored ? p.grad[row] * p.factor / (1.0f + __expf(p.stats[2 * row + 1])) : 0.0f;
    const int vocab = static_cast<int>(p.vocab), thread = threadIdx.x;
    auto other = [&](float logit) { return -miss * __expf(logit * p.factor - others); };
    // A row without a target is not read, because it may contain NaN, and 0 * NaN is NaN.
    auto one = [&](int i) {
        out[i] = from_float<T>(i == target ? miss : scored ? other(to_float(logits[i])) : 0.0f);
    };
    const bool alike = reinterpret_cast<std::uintptr_t>(logits) % 16 == reinterpret_cast<std::uintptr_t>(out) % 16;
    const int head = alike ? unaligned_head(logits, vocab) : vocab;
    const int packs = (vocab - head) / kPack<T>, tail = head + packs * kPack<T>;
    for (int i = thread; i < head; i += blockDim.x) one(i);
    if (tail + thread < vocab) one(tail + thread);
#pragma unroll 2
    for (int pack = thread; pack < packs; pack += blockDim.x) {
        const int first = head + pack * kPack<T>;
        float z[kPack<T>] = {};
        if (scored) {
            load_pack(logits + first, z);
#pragma unroll
            for (int i = 0; i < kPack<T>; ++i) z[i] = other(z[i]);
        }
        store_pack(out + first, z);
        // This is done after the store: if the value at the target might not be needed, compilers split the wide load.
        if (target >= first && target < first + kPack<T>) out[target] = from_float<T>(miss);
    }
}

}  // namespace

int selective_logprobs(const Gather& p, Where where) {
    if (p.rows == 0) return cudaSuccess;
    return for_dtype(p.dtype, [&](auto zero) {
        return launch(where, gather_forward<decltype(zero)>, dim3(p.rows), threads_for(p.vocab), p);
    });
}

int selective_logprobs_backward(const Gather& p, Where where) {
    if (p.rows == 0) return cudaSuccess;
    return for_dtype(p.dtype, [&](auto zero) {
        return launch(where, gather_backward<decltype(zero)>, dim3(p.rows), threads_for(p.vocab), p);
    });
}

}  // namespace fastalign::cuda
