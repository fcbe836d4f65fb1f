"""Losses over preference pairs: pure functions of per-sequence log-probabilities.

Everywhere `chosen`, `rejected`, `ref_chosen` and `ref_rejected` are (B,) tensors, all float32 or all float64: the
log-probability of each completion under the policy and under the reference, summed over its tokens unless the
docstring says averaged. The result is the (B,) loss of each pair in the same dtype. With u and v the log-ratios
`chosen - ref_chosen` and `rejected - ref_rejected`, the docstrings write m = u - v for the margin, s for the logistic
sigmoid and e for `label_smoothing`, the probability that a pair's label is flipped.

Values and gradients are finite and accurate at margins of +-1e4. Every function raises InputError for tensors that
differ in shape, dtype or device and for options out of range; none looks at tensor values, which would stall a GPU.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastalign.errors import InputError
from fastalign.losses.checks import check_logprobs, logistic, sigmoid_loss


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, elementwise, accurate for every x (Maechler 2012, "Accurately computing log(1 -
    exp(-|a|))"); -inf at 0, nan above. Any shape, any floating dtype.
    """
    near_zero = x > -math.log(2)
    # Each branch sees a harmless value where the other one is taken: an infinite gradient times zero would be nan.
    near, far = torch.where(near_zero, x, -1.0), torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def implicit_rewards(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Beta * (policy - reference), detached: the reward that DPO's policy implies, up to a term of the prompt alone
    (Rafailov et al. 2023, arXiv:2305.18290). (B,) log-probability sums in, (B,) rewards out.
    """
    check_logprobs(beta, policy=policy, reference=reference)
    return beta * (policy - reference).detach()


def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log s(beta m) - e log s(-beta m).

    Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7); with smoothing, conservative DPO
    (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO"). TRL calls it `sigmoid`, and has
    no smoothing there; on averages per token, `sigmoid_norm` (Lambert et al. 2024, arXiv:2411.15124).
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return logistic(beta * margin, label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """(m - 1/(2 beta))^2.

    Identity preference optimisation (Azar et al. 2023, arXiv:2310.12036, eq. 17, where beta is written tau). The
    caller decides between sums and averages per token: the paper writes sums, its authors ran averages, and so does
    TRL; `pairwise_loss` averages by default.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (margin - 1 / (2 * beta)).square()


def ipo_tau(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.5,
) -> Tensor:
    """(beta m - tau)^2: IPO with the target margin of the scaled rewards as its own option.

    tau = 1/2 gives beta^2 times `ipo` (Azar et al. 2023, arXiv:2310.12036, eq. 17), whose gradient does not grow as
    beta falls. Sums or averages per token, as for `ipo`.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not math.isfinite(tau):
        raise InputError(f"tau is {tau!r}; expected a finite number: 0.5 is the paper's target.")
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (beta * margin - tau).square()


def hinge(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """max(0, 1 - beta m).

    The rank calibration loss of SLiC-HF (Zhao et al. 2023, arXiv:2305.10425), on log-ratios to the reference
    as in RSO (Liu et al. 2023, arXiv:2309.06657, `hinge-norm`).
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    margin = (chosen - ref_chosen) - (rejected - ref_rejected)
    return torch.relu(1 - beta * margin)


def robust(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(-(1 - e) log s(beta m) + e log s(-beta m)) / (1 - 2 e).

    Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): the expectation over flipped labels is the DPO loss
    on clean ones. It has no lower bound: it falls as -e beta m / (1 - 2 e).
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    # The same function by log s(-x) = log s(x) - x, without the difference of two nearly equal terms at x << 0.
    return -F.logsigmoid(x) - label_smoothing / (1 - 2 * label_smoothing) * x


def exo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 1e-3,
) -> Tensor:
    """Q log(q / (1 - e)) + (1 - q) log((1 - q) / e) with q = s(beta m).

    Efficient exact optimisation on pairs (Ji et al. 2024, arXiv:2402.00856, eq. 16): the reverse KL from the policy's
    preference q to the smoothed label. Infinite at e = 0, which is therefore refused. TRL calls it `exo_pair`.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    if label_smoothing == 0:
        raise InputError("label_smoothing is 0 and the exo loss is infinite there; the paper recommends 1e-3.")
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    log_win, log_lose = F.logsigmoid(x), F.logsigmoid(-x)
    # Probabilities from their logarithms: see _sigmoid.
    win_term = log_win.exp() * (log_win - math.log1p(-label_smoothing))
    return win_term + log_lose.exp() * (log_lose - math.log(label_smoothing))


def nca(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """-log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v).

    Noise contrastive alignment on pairs (Chen et al. 2024, arXiv:2402.05369): raises the chosen
    log-probability itself, not only the margin. TRL calls it `nca_pair`.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    noise = F.logsigmoid(-chosen_reward) + F.logsigmoid(-rejected_reward)
    return -F.logsigmoid(chosen_reward) - 0.5 * noise


def bco_pair(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
) -> Tensor:
    """-log s(beta u - delta) - log s(-(beta v - delta)).

    Binary classifier optimisation on pairs (Jung et al. 2024, arXiv:2404.04656): both completions scored by
    one classifier. `delta`, a float or a scalar tensor, is the paper's reward shift, the running mean of
    (beta u + beta v) / 2 that the caller keeps; TRL's `bco_pair` has it 0.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_reward, rejected_reward = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - delta) - F.logsigmoid(delta - rejected_reward)


def sppo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """(u - 1/(2 beta))^2 + (v + 1/(2 beta))^2.

    Self-play preference optimisation (Wu et al. 2024, arXiv:2405.00675, eq. 4.7) with hard win probabilities, 1 for
    chosen and 0 for rejected; beta is the paper's 1/eta. TRL calls it `sppo_hard`.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    target = 1 / (2 * beta)
    return (chosen - ref_chosen - target).square() + (rejected - ref_rejected + target).square()


def apo_zero(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """1 - s(beta u) + s(beta v).

    Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7): chosen up, rejected down;
    for chosen answers better than the model's own.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    return sigmoid_loss(-beta * (chosen - ref_chosen)) + sigmoid_loss(beta * (rejected - ref_rejected))


def apo_down(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: float = 0.1
) -> Tensor:
    """s(beta u) + 1 - s(beta m).

    Anchored preference optimisation (D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8): both down, rejected
    further; for models better than the chosen answers.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    return sigmoid_loss(beta * chosen_ratio) + sigmoid_loss(-beta * (chosen_ratio - rejected_ratio))


def aot(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log s(beta d) - e log s(-beta d) with d = sort(chosen - rejected) - sort(ref_chosen - ref_rejected).

    Alignment via optimal transport, paired (Melnyk et al. 2024, arXiv:2406.05882): every quantile of the
    policy's margins should exceed the reference's. It sorts over the batch, so the entries follow the quantiles, not
    the pairs, and splitting a batch into micro-batches changes the loss.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    margins, ref_margins = (chosen - rejected).sort().values, (ref_chosen - ref_rejected).sort().values
    return logistic(beta * (margins - ref_margins), label_smoothing)


def aot_unpaired(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log s(beta d) - e log s(-beta d) with d = sort(u) - sort(v).

    Alignment via optimal transport, unpaired (Melnyk et al. 2024, arXiv:2406.05882): every quantile of the
    chosen log-ratios should exceed that of the rejected ones, which may answer other prompts. Sorts like `aot`.
    """
    check_logprobs(
        beta, label_smoothing, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    chosen_ratios, rejected_ratios = (chosen - ref_chosen).sort().values, (rejected - ref_rejected).sort().values
    return logistic(beta * (chosen_ratios - rejected_ratios), label_smoothing)


def discopop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
) -> Tensor:
    """-(1 - w) log s(x) + w exp(-x) with x = beta m and w = s(x / tau).

    DiscoPOP, the log-ratio modulated loss (Lu et al. 2024, arXiv:2406.08414, eq. 5). tau lies in (0, 1]: above 1 the
    second term grows exponentially as the margin falls.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if not 0 < discopop_tau <= 1:
        raise InputError(f"discopop_tau is {discopop_tau!r}; expected a number in (0, 1]: the paper uses 0.05.")
    x = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    scaled = x / discopop_tau
    # w exp(-x) as one exponential: at x = -1e4 the product would be 0 times infinity.
    return torch.exp(F.logsigmoid(scaled) - x) - sigmoid_loss(-scaled) * F.logsigmoid(x)


def simpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x) with x = beta (chosen - rejected - gamma/beta), on averages per token.

    Simple preference optimisation (Meng et al. 2024, arXiv:2405.14734, eq. 6): no reference. `gamma_beta_ratio` is
    the target margin of the averages; TRL's `simpo_gamma` is beta times it.
    """
    check_logprobs(beta, label_smoothing, chosen=chosen, rejected=rejected)
    if not math.isfinite(gamma_beta_ratio):
        raise InputError(f"gamma_beta_ratio is {gamma_beta_ratio!r}; expected a finite number: 0.5 is the usual start.")
    return logistic(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)


def cpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log s(x) - e log s(-x) with x = beta (chosen - rejected).

    The preference term of contrastive preference optimisation (Xu et al. 2024, arXiv:2401.08417, eq. 3): no
    reference. The paper's second term, the NLL of the chosen completion, is the caller's to add.
    """
    check_logprobs(beta, label_smoothing, chosen=chosen, rejected=rejected)
    return logistic(beta * (chosen - rejected), label_smoothing)


def orpo(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """-beta log s(logit(chosen) - logit(rejected)) with logit(a) = a - log(1 - exp(a)), on averages per token.

    The odds ratio term of ORPO (Hong et al. 2024, arXiv:2403.07691, eqs. 6 and 7), weighted by beta, the paper's
    lambda: no reference. The NLL term is the caller's to add. An average that has rounded to 0 (probability one)
    counts as the largest one below it, with no gradient.
    """
    check_logprobs(beta, chosen=chosen, rejected=rejected)
    below_zero = -torch.finfo(chosen.dtype).tiny
    chosen, rejected = chosen.clamp(max=below_zero), rejected.clamp(max=below_zero)
    log_odds_ratio = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds_ratio)
