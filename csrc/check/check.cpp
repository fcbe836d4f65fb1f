// Runs every kernel without Python or torch, for the sanitizers (sanitize.sh): both passes, every dtype, kept and
// recomputed probabilities, odd sizes, one to eight threads of its own. Results are held to a naive double version,
// and must be bitwise the same whatever the number of threads. The BRGEMM path runs with a plain loop in its place.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "cpu/brgemm.h"
#include "cpu/kernels.h"
#include "cpu/preference_loss.h"

namespace fastalign {
namespace plain { extern const Kernels kernels; }
namespace emulated { extern const Kernels kernels; }
}  // namespace fastalign

using namespace fastalign;
using Bytes = std::vector<unsigned char>;

namespace {

constexpr std::int64_t kTokens = 41, kVocab = 2311, kWidth = 35, kIgnored = 3;
int failures = 0;

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

// Values that every dtype holds exactly: multiples of 1/8 up to 1.
struct Data {
    std::int64_t tokens, vocab, width;
    std::vector<double> hidden, weight, grad;
    std::vector<std::int64_t> targets, rows;
    explicit Data(std::int64_t tokens = kTokens, std::int64_t vocab = kVocab, std::int64_t width = kWidth)
        : tokens(tokens), vocab(vocab), width(width), hidden(tokens * width), weight(vocab * width), grad(tokens),
          targets(tokens) {
        std::mt19937 random(0);
        auto eighth = [&] { return (static_cast<int>(random() % 17) - 8) / 8.0; };
        for (auto& x : hidden) x = eighth();
        for (auto& x : weight) x = eighth();
        for (auto& x : grad) x = eighth();
        for (auto& y : targets) y = random() % vocab;
        for (std::int64_t i = 0; i < tokens; ++i)
            if (i != kIgnored) rows.push_back(i);
    }
};

Bytes encode(const std::vector<double>& values, DType dtype) {
    Bytes out;
    for (double v : values) {
        unsigned char bytes[8];
        std::size_t size = 4;
        const float f = static_cast<float>(v);
        std::uint32_t bits;
        std::memcpy(&bits, &f, 4);
        if (dtype == DType::f64) {
            size = 8, std::memcpy(bytes, &v, 8);
        } else if (dtype == DType::f32) {
            std::memcpy(bytes, &f, 4);
        } else {
            const bool brain = dtype == DType::bf16;
            const std::uint32_t sign = (bits >> 16) & 0x8000u, size_bits = bits & 0x7fffffffu;
            const std::uint32_t half = size_bits ? ((size_bits - 0x38000000u) >> 13) : 0;
            const auto low = static_cast<std::uint16_t>(brain ? bits >> 16 : sign | half);
            size = 2, std::memcpy(bytes, &low, 2);
        }
        out.insert(out.end(), bytes, bytes + size);
    }
    return out;
}

std::vector<double> decode(const Bytes& bytes, bool wide) {
    std::vector<double> out(bytes.size() / (wide ? 8 : 4));
    for (std::size_t i = 0; i < out.size(); ++i) {
        float f;
        if (wide) std::memcpy(&out[i], &bytes[i * 8], 8);
        else std::memcpy(&f, &bytes[i * 4], 4), out[i] = f;
    }
    return out;
}

struct Results {
    Bytes logprobs, grad_logprobs, d_hidden, d_weight, d_bias;
};

Results run(const Kernels& kernels, const Data& data, DType dtype, int threads, bool keep) {
    const std::size_t acc = dtype == DType::f64 ? 8 : 4, element = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    const std::int64_t panel = dtype == DType::f64 ? kernels.panel_f64 : kernels.panel_f32;
    const std::int64_t tiles = (data.vocab + kernels.tile - 1) / kernels.tile;
    const Bytes hidden = encode(data.hidden, dtype), weight = encode(data.weight, dtype);
    const Bytes grad = encode(data.grad, acc == 8 ? DType::f64 : DType::f32);
    Bytes stats(data.tokens * 5 * acc), cache(panel * data.vocab * element), shifts(panel * tiles * acc);
    Results r{Bytes(data.tokens * acc), Bytes(data.tokens * data.width * acc), Bytes(data.tokens * data.width * acc),
              Bytes(data.vocab * data.width * element), Bytes(data.vocab * acc)};
    auto fill = [&](HeadProblem& p) {
        p.dtype = dtype;
        p.hidden = hidden.data(), p.hidden_stride = data.width, p.weight = weight.data(), p.weight_stride = data.width;
        p.targets = data.targets.data(), p.rows = data.rows.data();
        p.scored = static_cast<std::int64_t>(data.rows.size()), p.vocab = data.vocab, p.width = data.width;
        p.logit_scale = 1.5, p.softcap = 20, p.temperature = 0.75;
        if (keep) p.cache = cache.data(), p.shifts = shifts.data(), p.cache_rows = panel;  // the rest is recomputed
    };
    const Pool pool{threads, nullptr};
    ForwardProblem forward{};
    fill(forward);
    forward.logprobs = r.logprobs.data(), forward.stats = stats.data();
    forward.grad_logprobs = r.grad_logprobs.data();
    kernels.forward(forward, pool);
    BackwardProblem backward{};
    fill(backward);
    backward.grad_logprobs = grad.data(), backward.stats = stats.data();
    backward.d_hidden = r.d_hidden.data(), backward.d_weight = r.d_weight.data(), backward.d_bias = r.d_bias.data();
    kernels.backward(backward, pool);
    return r;
}

struct Truth {
    std::vector<double> logprobs, grad_logprobs, d_hidden, d_bias;
};

Truth naive(const Data& data) {
    Truth t{std::vector<double>(kTokens), std::vector<double>(kTokens * kWidth), std::vector<double>(kTokens * kWidth),
            std::vector<double>(kVocab)};
    std::vector<double> z(kVocab), slope(kVocab);
    for (const std::int64_t i : data.rows) {
        double sum = 0;
        for (std::int64_t v = 0; v < kVocab; ++v) {
            double u = 0;
            for (std::int64_t k = 0; k < kWidth; ++k) u += data.hidden[i * kWidth + k] * data.weight[v * kWidth + k];
            const double tanh = std::tanh(u * 1.5 / 20);
            z[v] = 20 * tanh / 0.75, slope[v] = (1 - tanh * tanh) * 1.5 / 0.75;
            sum += std::exp(z[v]);
        }
        const std::int64_t y = data.targets[i];
        t.logprobs[i] = z[y] - std::log(sum);
        for (std::int64_t v = 0; v < kVocab; ++v) {
            const double du = ((v == y) - std::exp(z[v]) / sum) * slope[v];
            t.d_bias[v] += data.grad[i] * du;
            for (std::int64_t k = 0; k < kWidth; ++k)
                t.grad_logprobs[i * kWidth + k] += du * data.weight[v * kWidth + k];
        }
        for (std::int64_t k = 0; k < kWidth; ++k)
            t.d_hidden[i * kWidth + k] = data.grad[i] * t.grad_logprobs[i * kWidth + k];
    }
    return t;
}

void expect(bool good, const char* kernels, int dtype, const char* what, double found) {
    if (good) return;
    ++failures;
    std::printf("FAILED %s dtype %d: %s (%g)\n", kernels, dtype, what, found);
}

double relative_error(const std::vector<double>& found, const std::vector<double>& truth) {
    double error = 0, size = 0;
    for (std::size_t i = 0; i < truth.size(); ++i)
        error += (found[i] - truth[i]) * (found[i] - truth[i]), size += truth[i] * truth[i];
    return std::sqrt(error / size);
}

void check(const Kernels& kernels, const Data& data, const Truth& truth, DType dtype) {
    const bool wide = dtype == DType::f64, low = dtype == DType::bf16 || dtype == DType::f16;
    const double eps = wide ? 2.2e-16 : 1.2e-7, rounded = dtype == DType::bf16 ? 8e-3 : low ? 1e-3 : 0;
    for (const bool keep : {false, true}) {
        const Results first = run(kernels, data, dtype, 1, keep);
        const int d = static_cast<int>(dtype);
        double error = relative_error(decode(first.logprobs, wide), truth.logprobs);
        expect(error < 40 * eps, kernels.name, d, "log-probs", error);
        error = relative_error(decode(first.grad_logprobs, wide), truth.grad_logprobs);
        expect(error < 40 * eps + rounded, kernels.name, d, "gradient of the log-probs", error);
        error = relative_error(decode(first.d_hidden, wide), truth.d_hidden);
        expect(error < 40 * eps + rounded, kernels.name, d, "gradient in hidden", error);
        error = relative_error(decode(first.d_bias, wide), truth.d_bias);
        expect(error < 40 * eps + (keep ? rounded : 0), kernels.name, d, "gradient in bias", error);
        for (const int threads : {2, 8}) {
            const Results other = run(kernels, data, dtype, threads, keep);
            const bool same = other.logprobs == first.logprobs && other.grad_logprobs == first.grad_logprobs &&
                              other.d_hidden == first.d_hidden && other.d_weight == first.d_weight &&
                              other.d_bias == first.d_bias;
            expect(same, kernels.name, d, "threads change the bits", threads);
        }
    }
}

// Two blocks of rows and two chunks of a vocabulary so wide that a chunk is one tile: what one worker writes others read.
void check_blocks(const Kernels& kernels, DType dtype) {
    const Data data(200, 300, 2112);
    const Results first = run(kernels, data, dtype, 1, true), other = run(kernels, data, dtype, 2, true);
    const bool same = other.d_hidden == first.d_hidden && other.d_weight == first.d_weight;
    expect(same, kernels.name, static_cast<int>(dtype), "threads change the bits of blocks", 2);
}

struct Selected {
    Bytes logprobs, d_logits, in_place;
};

// The weight's rows serve as logits: kVocab rows of kWidth, the targets repeated, every tenth ignored.
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

// One pair and an empty one at a margin of 0: dpo's log 2, and slopes of half of beta.
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

struct Diverged {
    Bytes values, grad, stats;
};

// A teacher with the student's tensors, but another scale and no cap; groups of the fewest rows, or of all.
Diverged run_divergence(const Kernels& kernels, const Data& data, DType dtype, Divergence kind, int threads, bool all) {
    const std::size_t acc = dtype == DType::f64 ? 8 : 4;
    const Bytes hidden = encode(data.hidden, dtype), weight = encode(data.weight, dtype);
    Diverged r{Bytes(kTokens * acc), Bytes(kTokens * kWidth * acc), Bytes(kTokens * 5 * acc)};
    DivergenceProblem p{};
    for (HeadProblem* side : {&p.student, &p.teacher}) {
        side->hidden = hidden.data(), side->hidden_stride = kWidth;
        side->weight = weight.data(), side->weight_stride = kWidth;
        side->rows = data.rows.data(), side->scored = static_cast<std::int64_t>(data.rows.size());
        side->vocab = kVocab, side->width = kWidth, side->temperature = 0.75;
    }
    p.student.logit_scale = 1.5, p.student.softcap = 20, p.teacher.logit_scale = 1.25;
    p.dtype = dtype, p.kind = kind, p.beta = 0.25, p.budget = all ? 64 << 20 : 0;
    p.values = r.values.data(), p.grad_hidden = r.grad.data(), p.stats = r.stats.data();
    kernels.divergence(p, Pool{threads, nullptr});
    return r;
}

using Wide = long double;  // plain sums lose digits of a small divergence, and doubles are checked too

void naive_divergence(const Data& data, Divergence kind, std::vector<double>& values, std::vector<double>& grad) {
    std::vector<Wide> a(kVocab), b(kVocab), slope(kVocab);
    for (const std::int64_t i : data.rows) {
        Wide sum_a = 0, sum_b = 0, moment = 0;
        for (std::int64_t v = 0; v < kVocab; ++v) {
            Wide u = 0;
            for (std::int64_t k = 0; k < kWidth; ++k)
                u += Wide(data.hidden[i * kWidth + k]) * data.weight[v * kWidth + k];
            const Wide tanh = std::tanh(u * 1.5 / 20);
            a[v] = 20 * tanh / 0.75, slope[v] = (1 - tanh * tanh) * 1.5 / 0.75, b[v] = u * 1.25 / 0.75;
            sum_a += std::exp(a[v]), sum_b += std::exp(b[v]);
        }
        for (const bool again : {false, true})
            for (std::int64_t v = 0; v < kVocab; ++v) {
                const Wide s = std::exp(a[v]) / sum_a, t = std::exp(b[v]) / sum_b, m = 0.25 * t + 0.75 * s;
                const Wide ratio = std::log(kind == Divergence::jsd ? s / m : s / t);
                Wide c = kind == Divergence::forward_kl ? s - t : s * (ratio - moment);
                if (kind == Divergence::jsd) c *= 0.75;
                for (std::int64_t k = 0; again && k < kWidth; ++k)
                    grad[i * kWidth + k] += c * slope[v] * data.weight[v * kWidth + k];
                if (again) continue;
                moment += s * ratio;
                values[i] += kind == Divergence::forward_kl   ? -t * ratio
                             : kind == Divergence::reverse_kl ? s * ratio
                                                              : 0.25 * t * std::log(t / m) + 0.75 * s * ratio;
            }
    }
}

void check_divergence(const Kernels& kernels, const Data& data, DType dtype) {
    const bool wide = dtype == DType::f64;
    const double eps = wide ? 2.2e-16 : 1.2e-7;
    const double rounded = dtype == DType::bf16 ? 8e-3 : dtype == DType::f16 ? 1e-3 : 0;
    for (const Divergence kind : {Divergence::forward_kl, Divergence::reverse_kl, Divergence::jsd}) {
        std::vector<double> values(kTokens), grad(kTokens * kWidth);
        naive_divergence(data, kind, values, grad);
        const Diverged first = run_divergence(kernels, data, dtype, kind, 1, true);
        double error = relative_error(decode(first.values, wide), values);
        expect(error < 100 * eps, kernels.name, static_cast<int>(dtype), "divergences", error);
        error = relative_error(decode(first.grad, wide), grad);
        expect(error < 100 * eps + rounded, kernels.name, static_cast<int>(dtype), "gradient of a divergence", error);
        for (const int threads : {2, 8}) {
            const Diverged other = run_divergence(kernels, data, dtype, kind, threads, threads == 8);
            const bool same = other.values == first.values && other.grad == first.grad && other.stats == first.stats;
            expect(same, kernels.name, static_cast<int>(dtype), "threads or budget change a divergence", threads);
        }
    }
}

// Small positive numbers of any dtype: exponents around 1, whatever behind them.
template <typename In, typename Acc>
void fill_near_one(std::vector<In>& values, DType dtype) {
    for (std::size_t i = 0; i < values.size(); ++i) {
        const Acc x = static_cast<Acc>(0.5 + (i * 7 % 13) / 16.0);
        if constexpr (sizeof(In) == sizeof(Acc)) std::memcpy(&values[i], &x, sizeof(x));
        else values[i] = static_cast<In>(dtype == DType::bf16 ? 0x3f00 + i * 7 % 256 : 0x3800 + i * 7 % 1024);
    }
}

// Norms and gated activations, forward and backward, in buffers of just their size: for the sanitizers, and that
// threads change no bit. Their values are held to float64 in tests/test_body.py.
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

// Attention, likewise: several blocks of queries and tiles of keys, a shared prefix, windows; tests/test_cpu_attention.py.
template <typename In, typename Acc>
std::vector<In> run_attention(const Kernels& kernels, DType dtype, std::int64_t window, int threads) {
    constexpr std::int64_t heads = 4, key_heads = 2, width = 5, value_width = 7, tokens = 450;
    const std::int64_t segments[] = {0, 280, 0, 0, 280, 140, 0, 270, 420, 1, 0, 1, 421, 29, 421, 0};
    const std::int64_t sizes[] = {heads * width, key_heads * width, key_heads * value_width, heads * value_width};
    std::vector<In> in[4], out[4];
    for (int i = 0; i < 4; ++i) {
        in[i].resize(tokens * sizes[i]), out[i].resize(tokens * sizes[i]);
        fill_near_one<In, Acc>(in[i], dtype);
        std::memset(out[i].data(), 0xff, out[i].size() * sizeof(In));  // no number: shows what was not written
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
