// Runs every kernel without Python or torch, for the sanitizers (sanitize.sh): both passes, every dtype, kept and
// recomputed probabilities, odd sizes, one to eight threads. Results are compared with a naive version in double, and
// must be bitwise the same for any number of threads. A plain loop stands in for BRGEMM.


#include "check/check.h"
#include "cpu/kernels/preference_loss.h"
#include "cpu/tiles/brgemm.h"

namespace {

float from_bf16(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float out;
    std::memcpy(&out, &wide, 4);
    return out;
}

void plain_brgemm(std::int64_t m, std::int64_t n, std::int64_t k, std::int64_t lda, std::int64_t ldb, std::int64_t ldc,
                  bool add, const void* a, const void* b, float* c, bool) {
    const auto* left = static_cast<const std::uint16_t*>(a);
    const auto* right = static_cast<const std::uint16_t*>(b);
    for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < n; ++j) {
            float sum = add ? c[i * ldc + j] : 0.0f;
            for (std::int64_t x = 0; x < k; ++x)
                sum += from_bf16(left[i * lda + x]) * from_bf16(right[(x / 2 * ldb + j) * 2 + x % 2]);
            c[i * ldc + j] = sum;
        }
}

struct Selected {
    Bytes logprobs, d_logits, in_place;
};

// The rows of the weight are used as logits: kVocab rows of kWidth. The targets repeat, and every tenth is ignored.
Selected select(const Kernels& kernels, const Data& data, DType dtype, int threads, bool stream) {
    const std::size_t acc = dtype == DType::f64 ? 8 : 4;
    const Bytes logits = encode(data.weight, dtype);
    Bytes stats(kVocab * 2 * acc), grad = encode(std::vector<double>(kVocab, 0.5), acc == 8 ? DType::f64 : DType::f32);
    Selected s{Bytes(kVocab * acc), Bytes(logits.size()), logits};
    std::vector<std::int64_t> targets(kVocab);
    for (std::int64_t r = 0; r < kVocab; ++r) targets[r] = r % 10 ? r % kWidth : -100;
    SelectiveProblem p{};
    p.dtype = dtype, p.logits = logits.data(), p.targets = targets.data(), p.rows = kVocab, p.vocab = kWidth;
    p.inner = kVocab, p.inner_stride = kWidth, p.ignore_index = -100, p.temperature = 0.5;
    p.logprobs = s.logprobs.data(), p.stats = stats.data(), p.grad = grad.data();
    const Pool pool{threads, nullptr};
    kernels.selective_forward(p, pool);
    p.d_logits = s.d_logits.data(), p.cache_bytes = stream ? 0 : 1 << 30;
    kernels.selective_backward(p, pool);
    p.logits = s.in_place.data(), p.d_logits = nullptr;
    kernels.selective_backward(p, pool);
    return s;
}

void check_selective(const Kernels& kernels, const Data& data, DType dtype) {
    const bool wide = dtype == DType::f64;
    const int d = static_cast<int>(dtype);
    const Selected first = select(kernels, data, dtype, 1, false);
    std::vector<double> truth(kVocab);
    for (std::int64_t r = 0; r < kVocab; ++r) {
        double sum = 0;
        for (std::int64_t v = 0; v < kWidth; ++v) sum += std::exp(data.weight[r * kWidth + v] / 0.5);
        truth[r] = r % 10 ? data.weight[r * kWidth + r % kWidth] / 0.5 - std::log(sum) : 0;
    }
    const double error = relative_error(decode(first.logprobs, wide), truth);
    expect(error < (wide ? 1e-15 : 4e-7), kernels.name, d, "selected log-probs", error);
    expect(first.d_logits == first.in_place, kernels.name, d, "the gradient in place differs", 0);
    for (const int threads : {2, 8}) {
        const Selected other = select(kernels, data, dtype, threads, true);
        const bool same = other.logprobs == first.logprobs && other.d_logits == first.d_logits;
        expect(same, kernels.name, d, "threads change the bits of selected log-probs", threads);
    }
}

// One pair, and one empty pair whose margin is 0. There dpo's loss is log 2, and the slopes are half of beta.
void check_preference() {
    const std::vector<double> logprobs{-1, -1, -2};
    const std::vector<std::int64_t> offsets{0, 2, 3, 3, 3};
    std::vector<double> losses(2), rewards(4), sums(4), coefficients(3), back(3);
    const PreferenceProblem p{logprobs.data(), offsets.data(), nullptr, nullptr, nullptr, nullptr, 3, 4,
                              LossForm::logistic, false, true, 0.5, 0.5, 0, 0, losses.data(), rewards.data(),
                              sums.data(), coefficients.data()};
    expect(offsets_fit(offsets.data(), 4, 3) && !offsets_fit(offsets.data(), 4, 4), "plain", 1, "offsets", 0);
    PreferencePass<double>{p}.run();
    for (const double loss : losses) expect(std::abs(loss - std::log(2.0)) < 1e-15, "plain", 1, "preference", loss);
    expect(coefficients == std::vector<double>{-0.25, -0.25, 0.25}, "plain", 1, "coefficients", coefficients[0]);
    preference_loss_backward(losses.data(), sums.data(), coefficients.data(), offsets.data(), 4, 2, true, back.data());
    expect(back[2] == losses[0] * 0.25 - 2, "plain", 1, "gradient of losses and sums", back[2]);
}

// Bytes that are small positive numbers in any dtype: the exponent is near that of 1, the other bits are arbitrary.
template <typename In, typename Acc>
void fill_near_one(std::vector<In>& values, DType dtype) {
    for (std::size_t i = 0; i < values.size(); ++i) {
        const Acc x = static_cast<Acc>(0.5 + (i * 7 % 13) / 16.0);
        if constexpr (sizeof(In) == sizeof(Acc)) std::memcpy(&values[i], &x, sizeof(x));
        else values[i] = static_cast<In>(dtype == DType::bf16 ? 0x3f00 + i * 7 % 256 : 0x3800 + i * 7 % 1024);
    }
}

// Norms and gated activations, forward and backward, in buffers of exactly their size, for the sanitizers. It also
// checks that threads change no bit. The Python tests compare their values with float64.
template <typename In, typename Acc>
std::vector<In> run_body(const Kernels& kernels, DType dtype, int threads) {
    constexpr std::int64_t rows = 37, width = 75, size = rows * width;
    std::vector<In> in[3], out[5];
    for (auto& v : in) v.resize(size);
    for (auto& v : out) v.resize(size);
    std::vector<Acc> scale(rows);
    for (auto& v : in) fill_near_one<In, Acc>(v, dtype);
    const Pool pool{threads, nullptr};
    kernels.rms_norm({dtype, rows, width, 1e-5, in[0].data(), in[1].data(), scale.data(), nullptr, out[0].data()}, pool);
    kernels.rms_norm({dtype, rows, width, 1e-5, in[0].data(), in[1].data(), scale.data(), in[2].data(), out[1].data()}, pool);
    kernels.gated({dtype, size, in[0].data(), in[1].data(), out[2].data(), nullptr, nullptr, nullptr}, pool);
    kernels.gated({dtype, size, in[0].data(), in[1].data(), nullptr, in[2].data(), out[3].data(), out[4].data()}, pool);
    std::vector<In> all;
    for (const auto& v : out) all.insert(all.end(), v.begin(), v.end());
    return all;
}

template <typename In, typename Acc>
void check_body(const Kernels& kernels, DType dtype) {
    const std::vector<In> first = run_body<In, Acc>(kernels, dtype, 1);
    for (const int threads : {2, 8})
        expect(run_body<In, Acc>(kernels, dtype, threads) == first, kernels.name, static_cast<int>(dtype),
               "threads change a norm or a gate", threads);
}

// The same for attention, with several blocks of queries and tiles of keys, a shared prefix, and windows.
template <typename In, typename Acc>
std::vector<In> run_attention(const Kernels& kernels, DType dtype, std::int64_t window, int threads) {
    constexpr std::int64_t heads = 4, key_heads = 2, width = 5, value_width = 7, tokens = 450;
    const std::int64_t segments[] = {0, 280, 0, 0, 280, 140, 0, 270, 420, 1, 0, 1, 421, 29, 421, 0};
    const std::int64_t sizes[] = {heads * width, key_heads * width, key_heads * value_width, heads * value_width};
    std::vector<In> in[4], out[4];
    for (int i = 0; i < 4; ++i) {
        in[i].resize(tokens * sizes[i]), out[i].resize(tokens * sizes[i]);
        fill_near_one<In, Acc>(in[i], dtype);
        std::memset(out[i].data(), 0xff, out[i].size() * sizeof(In));  // NaN: shows what was not written
    }
    std::vector<Acc> log_sums(tokens * heads);
    AttentionProblem p{};
    p.dtype = dtype, p.heads = heads, p.key_heads = key_heads, p.width = width, p.value_width = value_width;
    p.query = {in[0].data(), width, heads * width}, p.key = {in[1].data(), width, key_heads * width};
    p.value = {in[2].data(), value_width, key_heads * value_width};
    p.segments = segments, p.count = 4, p.scaling = 0.5, p.window = window;
    p.out = out[3].data(), p.log_sums = log_sums.data();
    const Pool pool{threads, nullptr};
    kernels.attention(p, pool);
    p.grad = {in[3].data(), value_width, heads * value_width};
    p.d_query = out[0].data(), p.d_key = out[1].data(), p.d_value = out[2].data();
    kernels.attention(p, pool);
    std::vector<In> all;
    for (const auto& v : out) all.insert(all.end(), v.begin(), v.end());
    return all;
}

template <typename In, typename Acc>
void check_attention(const Kernels& kernels, DType dtype) {
    for (const std::int64_t window : {std::int64_t{30}, std::int64_t{450}}) {
        const std::vector<In> first = run_attention<In, Acc>(kernels, dtype, window, 1);
        for (const int threads : {2, 8})
            expect(run_attention<In, Acc>(kernels, dtype, window, threads) == first, kernels.name,
                   static_cast<int>(dtype), "threads change attention", threads);
        if (dtype != DType::bf16) continue;
        auto wide = [](const auto& values) {
            std::vector<double> out;
            for (const std::uint32_t x : values) {
                const std::uint32_t bits = x << 16;
                float value;
                std::memcpy(&value, &bits, 4);
                out.push_back(value);
            }
            return out;
        };
        const auto others = run_attention<std::uint16_t, float>(plain::kernels, dtype, window, 1);
        const double error = relative_error(wide(first), wide(others));
        expect(error < 2e-2, kernels.name, static_cast<int>(dtype), "attention differs from the plain kernels'", error);
    }
}

}  // namespace

int main() {
    brgemm_bf16 = &plain_brgemm;
    const Data data;
    const Truth truth = naive(data);
    for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
        for (const Kernels* kernels : {&plain::kernels, &emulated::kernels}) {
            check(*kernels, data, truth, dtype);
            check_divergence(*kernels, data, dtype);
        }
        if (dtype == DType::bf16) check_attention<std::uint16_t, float>(emulated::kernels, dtype);
        if (dtype == DType::bf16) check_blocks(emulated::kernels, dtype);
        for (const Kernels* kernels : available_kernels()) check_selective(*kernels, data, dtype);
    }
    for (const Kernels* kernels : available_kernels()) {
        check(*kernels, data, truth, DType::f32);
        check_divergence(*kernels, data, DType::f32);
    }
    for (const Kernels* kernels : available_kernels()) {
        check_body<float, float>(*kernels, DType::f32), check_attention<float, float>(*kernels, DType::f32);
        check_body<double, double>(*kernels, DType::f64), check_attention<double, double>(*kernels, DType::f64);
        check_body<std::uint16_t, float>(*kernels, DType::bf16), check_attention<std::uint16_t, float>(*kernels, DType::bf16);
        check_body<std::uint16_t, float>(*kernels, DType::f16), check_attention<std::uint16_t, float>(*kernels, DType::f16);
    }
    check_preference();
    std::printf(failures ? "%d failures\n" : "all good\n", failures);
    return failures != 0;
}
