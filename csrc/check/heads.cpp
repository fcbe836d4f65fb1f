// Compares linear_logprobs and linear_divergence with naive versions in double (see check.cpp).

#include "check/check.h"

namespace {

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
        if (keep) p.cache = cache.data(), p.shifts = shifts.data(), p.cache_rows = panel;  // others are recomputed
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

struct Diverged {
    Bytes values, grad, stats;
};

// The teacher has the student's tensors, but another scale and no cap. A group has as few rows as possible, or all.
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

using Wide = long double;  // double loses digits of a small divergence, and double kernels are checked too

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

}  // namespace

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

// Two blocks of rows and two chunks, with a width so large that a chunk is one tile. Here workers read what other
// workers have written.
void check_blocks(const Kernels& kernels, DType dtype) {
    const Data data(200, 300, 2112);
    const Results first = run(kernels, data, dtype, 1, true), other = run(kernels, data, dtype, 2, true);
    const bool same = other.d_hidden == first.d_hidden && other.d_weight == first.d_weight;
    expect(same, kernels.name, static_cast<int>(dtype), "threads change the bits of blocks", 2);
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
