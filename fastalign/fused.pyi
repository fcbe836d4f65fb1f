"""The functions of fused.py, those that it makes from the table of losses included. Written by a test."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fastalign.ops.backends.pick import Backend

__all__ = [
    "PreferenceOutput",
    "UnpairedOutput",
    "fused_linear_aot",
    "fused_linear_aot_unpaired",
    "fused_linear_apo_down",
    "fused_linear_apo_zero",
    "fused_linear_apo_zero_unpaired",
    "fused_linear_bco",
    "fused_linear_bco_pair",
    "fused_linear_cpo",
    "fused_linear_discopop",
    "fused_linear_dpo",
    "fused_linear_dpo_alpha",
    "fused_linear_dpo_forward_kl",
    "fused_linear_dpo_js",
    "fused_linear_dpo_norm",
    "fused_linear_exo",
    "fused_linear_hinge",
    "fused_linear_ipo",
    "fused_linear_ipo_tau",
    "fused_linear_kto",
    "fused_linear_nca",
    "fused_linear_orpo",
    "fused_linear_preference",
    "fused_linear_robust",
    "fused_linear_sft",
    "fused_linear_simpo",
    "fused_linear_sppo",
]

class PreferenceOutput(NamedTuple):
    """The loss over B pairs, and what it was made of. Only `loss` carries gradients.

    Attributes:
        loss: () the mean over pairs, plus nll_weight * nll.
        chosen_logps: (B,) log-probabilities of the chosen completions in nats, summed over their tokens.
        rejected_logps: (B,) those of the rejected completions.
        chosen_rewards: (B,) beta * (logps - the reference's logps), or beta * logps without a reference.
        rejected_rewards: (B,) those of the rejected completions.
        nll: () the mean over the chosen tokens, or over those of nll_targets, in nats per token.
    """

    loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    nll: Tensor

class UnpairedOutput(NamedTuple):
    """The loss over B single completions, and what it was made of. Only `loss` carries gradients.

    Attributes:
        loss: () the mean over completions.
        logps: (B,) log-probabilities in nats, summed over each completion's tokens.
        rewards: (B,) beta * (logps - the reference's logps).
    """

    loss: Tensor
    logps: Tensor
    rewards: Tensor

def fused_linear_aot(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """AOT, paired: every quantile of the policy's margins should exceed that of the reference's margins.

        L = -(1 - eps) log s(beta d) - eps log s(-beta d)  with
        d = sort(chosen - rejected) - sort(ref_chosen - ref_rejected)

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="aot"`.
    `fastalign.losses.aot` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_aot_unpaired(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """AOT, unpaired: every quantile of the chosen log-ratios should exceed that of the rejected ones.

        L = -(1 - eps) log s(beta d) - eps log s(-beta d)  with
        d = sort(chosen - ref_chosen) - sort(rejected - ref_rejected)

    The rejected completions may answer other prompts than the chosen ones.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="aot_unpaired"`.
    `fastalign.losses.aot_unpaired` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_apo_down(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Anchored preference optimisation (APO-down): both down, the rejected completion further.

        L = s(beta u) + 1 - s(beta m)

    It suits models that are better than the chosen completions.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="apo_down"`.
    `fastalign.losses.apo_down` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_apo_zero(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Anchored preference optimisation (APO-zero): chosen up, rejected down.

        L = 1 - s(beta u) + s(beta v)

    It suits chosen completions that are better than what the model writes itself.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="apo_zero"`.
    `fastalign.losses.apo_zero` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_apo_zero_unpaired(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> UnpairedOutput:
    """Anchored preference optimisation (APO-zero) on single completions: KTO with its reference point at 0.

        L = w_d (1 - s(beta u)) where desirable,
            w_u s(beta u) where not

    It needs no mismatched completions. On a pair, the sum of both is `apo_zero`.

    Computed from hidden states: the mean over B completions.
    `labels` is (B,) bool, True where the completion is desirable.
    `fastalign.losses.apo_zero_unpaired` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_bco(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    delta: float | Tensor = 0.0,
    beta: float = 0.1,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> UnpairedOutput:
    """Binary classifier optimisation (BCO).

        L = -log s(beta u - delta) where desirable,
            -log s(delta - beta u) where not

    Computed from hidden states: the mean over B completions.
    `labels` is (B,) bool, True where the completion is desirable.
    `fastalign.losses.bco` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_bco_pair(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    delta: float | Tensor = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Binary classifier optimisation (BCO) on pairs: one classifier scores both completions.

        L = -log s(beta u - delta) - log s(-(beta v - delta))

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="bco_pair"`.
    `fastalign.losses.bco_pair` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_cpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    nll_weight: float = 1.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """The preference term of contrastive preference optimisation (CPO).

        L = -(1 - eps) log s(x) - eps log s(-x)  with  x = beta (chosen - rejected)

    The paper's second term is the NLL of the chosen completion. It is a mean over tokens, so it is added outside: the
    trainer and `fused_linear_cpo` add it with weight 1 by default.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="cpo"`.
    `fastalign.losses.cpo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_discopop(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    discopop_tau: float = 0.05,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """DiscoPOP, the log-ratio modulated loss: logistic below a margin of 0, exponential above it.

        L = -(1 - w) log s(x) + w exp(-x)  with  x = beta m,  w = s(x / tau)

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="discopop"`.
    `fastalign.losses.discopop` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_dpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Direct preference optimisation (DPO); with label smoothing, conservative DPO.

        L = -(1 - eps) log s(beta m) - eps log s(-beta m)

    On averages per token this is the row `dpo_norm` of the table, which TRL calls `sigmoid_norm`. TRL 1.16 ignores
    `label_smoothing` in both `sigmoid` and `sigmoid_norm`.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="dpo"`.
    `fastalign.losses.dpo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_dpo_alpha(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """DPO under the alpha-divergence: DPO as alpha goes to 0, DPO under the forward KL at 1.

        L = -log s(beta (exp(-alpha v) - exp(-alpha u)) / alpha)

    It is the f-divergence with f'(r) = (1 - r^-alpha) / alpha. TRL's `f_alpha_divergence_coef` is 1 - alpha.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="dpo_alpha"`.
    `fastalign.losses.dpo_alpha` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_dpo_forward_kl(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """DPO under the forward KL.

        L = -log s(beta (exp(-v) - exp(-u)))

    It is the f-divergence with f'(r) = -1 / r.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="dpo_forward_kl"`.
    `fastalign.losses.dpo_forward_kl` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_dpo_js(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """DPO under the Jensen-Shannon divergence.

        L = -(1 - eps) log s(x) - eps log s(-x)  with  x = beta (log s(u) - log s(v))

    It is the f-divergence with f'(r) = log(2 r / (1 + r)) = log 2 + log s(log r).

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="dpo_js"`.
    `fastalign.losses.dpo_js` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_dpo_norm(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Direct preference optimisation (DPO); with label smoothing, conservative DPO.

        L = -(1 - eps) log s(beta m) - eps log s(-beta m)

    On averages per token this is the row `dpo_norm` of the table, which TRL calls `sigmoid_norm`. TRL 1.16 ignores
    `label_smoothing` in both `sigmoid` and `sigmoid_norm`.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="dpo_norm"`.
    `fastalign.losses.dpo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_exo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.001,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Efficient exact optimisation (EXO): the reverse KL from the policy's preference to the smoothed label.

        L = q log(q / (1 - eps)) + (1 - q) log((1 - q) / eps)  with  q = s(beta m)

    The policy prefers the chosen completion with probability q, the label says 1 - eps. At eps = 0 the KL is infinite
    for every q below 1, so that value is refused. TRL calls this loss `exo_pair`.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="exo"`.
    `fastalign.losses.exo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_hinge(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """The rank calibration loss of SLiC-HF, on log-ratios to the reference as in RSO.

        L = max(0, 1 - beta m)

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="hinge"`.
    `fastalign.losses.hinge` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_ipo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Identity preference optimisation (IPO): pulls the margin to a fixed target, so that it cannot grow for ever.

        L = (m - 1 / (2 beta))^2

    The paper writes sums of log-probabilities. TRL uses averages per token. This function computes the formula on what
    it is given, and a target that suits averages is far too small for sums. The trainer and `pairwise_loss` give it
    averages unless `length_normalised` says otherwise.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="ipo"`.
    `fastalign.losses.ipo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_ipo_tau(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    tau: float = 0.5,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """IPO with a separate option for the target margin of the scaled rewards.

        L = (beta m - tau)^2

    With tau = 1/2 this is beta^2 times `ipo`. Unlike `ipo`'s, its gradient stays bounded for small beta.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="ipo_tau"`.
    `fastalign.losses.ipo_tau` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_kto(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    labels: Tensor,
    *,
    kl: float | Tensor = 0.0,
    beta: float = 0.1,
    weights: tuple[float, float] = (1.0, 1.0),
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> UnpairedOutput:
    """Kahneman-Tversky optimisation (KTO).

        L = w_d (1 - s(beta (u - kl))) where desirable,
            w_u (1 - s(beta (kl - u))) where not

    With kl = 0 this is `apo_zero_unpaired`.

    Computed from hidden states: the mean over B completions.
    `labels` is (B,) bool, True where the completion is desirable.
    `fastalign.losses.kto` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_nca(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Noise contrastive alignment (NCA): raises the chosen log-probability itself, not only the margin.

        L = -log s(beta u) - 1/2 log s(-beta u) - 1/2 log s(-beta v)

    TRL calls it `nca_pair`.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="nca"`.
    `fastalign.losses.nca` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_orpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    nll_weight: float = 1.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """The odds ratio term of ORPO, on averages per token.

        L = -beta log s(logit(chosen) - logit(rejected))  with  logit(a) = a - log(1 - exp(a))

    The paper's first term is the NLL of the chosen completion. It is a mean over tokens, so it is added outside: the
    trainer and `fused_linear_orpo` add it with weight 1 by default.
    Over prompt and completion together, as the paper's authors and TRL take it, it is `fused_linear_orpo`'s
    `nll_targets` and the trainer's `nll_over`.

    An average of 0 means probability one and infinite odds. An average that has rounded to 0 therefore counts as the
    largest number below 0, and gets no gradient.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="orpo"`.
    `fastalign.losses.orpo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_preference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    loss_type: str | Sequence[str] = "dpo",
    loss_weights: Sequence[float] | None = None,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
    **loss_options: Any,
) -> PreferenceOutput:
    """A loss over pairs, or a weighted mixture of several, from hidden states.

        loss = mean over pairs of sum_k loss_weights[k] * loss_type[k](pair), plus nll_weight * nll

    The head of this file describes the two layouts, the shift of the targets and the reference.

    Args:
        hidden: (2B, T, H) hidden states, or (S, H) packed.
        weight: (V, H) weight of the output layer.
        targets: (2B, T) or (S,) int64; `targets[..., t]` is the token that `hidden[..., t]` predicts.
        loss_type: A name in `fastalign.losses.PAIRWISE`, TRL's name for one, or several of these for a mixture.
        loss_weights: One weight per loss; None: 1 each.
        length_normalised: Names of the losses that are given averages per token instead of sums; None: those that the
            table of losses says.
        cu_seqlens: (2B + 1,) int64 or int32 offsets of packed sequences, rising from 0 to S; None where padded.
        bias: (V,) bias of the output layer.
        ref_logps: (2B,) float32 or float64 log-probability sums under the reference.
        ref_hidden: Hidden states of the reference, like `hidden`, instead of `ref_logps`.
        ref_weight: The reference's output layer; None: `weight`, and then `bias` too.
        ref_bias: The bias of `ref_weight`.
        nll_weight: Weight of the NLL (the second term of RPO, CPO and ORPO): the mean over the tokens of the chosen
            completions, in nats.
        nll_targets: Shaped like `targets`, to take the NLL over more tokens, such as prompt and completion. It holds
            the tokens to count in the chosen rows, and agrees with `targets` where both are set. Its rejected rows are
            not read.
        logit_scale: Factor of the logits.
        softcap: c in `c * tanh(logits / c)`; None: no cap.
        temperature: What the logits are divided by, after the cap.
        ignore_index: The target of positions that are not scored; None: every position is scored.
        memory_budget: Bytes of probability tiles that are stored for the gradient of a trainable output layer.
        backend: As for `linear_logprobs`.
        **loss_options: The options of the losses: beta, label_smoothing, ...

    Returns:
        The loss with its parts.

    Raises:
        InputError: Shapes, dtypes, options or the reference do not fit.

    References:
        Mixtures (MPO): Wang et al. 2024, arXiv:2411.10442.
    """

def fused_linear_robust(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Robust DPO: an unbiased estimate of the DPO loss when a known share of the labels is wrong.

        L = (-(1 - eps) log s(beta m) + eps log s(-beta m)) / (1 - 2 eps)

    If labels are flipped with probability eps, the expected value of this loss equals DPO on the correct labels. It
    has no lower bound: for large margins it falls as -eps beta m / (1 - 2 eps).

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="robust"`.
    `fastalign.losses.robust` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_sft(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    num_items: float | Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Negative log-likelihood of supervised fine-tuning, from hidden states.

        loss = -sum over scored tokens of log p(target) / num_items

    Args:
        hidden: (..., H) hidden states.
        weight: (V, H) weight of the output layer.
        targets: (...) int64; `targets[..., t]` is the token that `hidden[..., t]` predicts.
        num_items: Number of scored tokens in the whole accumulated batch, so that the losses of micro-batches add up to
            its mean; None: the number in this call.
        bias: (V,) bias of the output layer.
        logit_scale: Factor of the logits.
        softcap: c in `c * tanh(logits / c)`; None: no cap.
        temperature: What the logits are divided by, after the cap.
        ignore_index: The target of positions that are not scored; None: every position is scored.
        memory_budget: Bytes of probability tiles that are stored for the gradient of a trainable output layer.
        backend: As for `linear_logprobs`.

    Returns:
        A scalar, in nats per token.

    Raises:
        InputError: Shapes, dtypes or options do not fit.
    """

def fused_linear_simpo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Simple preference optimisation (SimPO), on averages per token.

        L = -(1 - eps) log s(x) - eps log s(-x)  with  x = beta (chosen - rejected - gamma / beta)

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="simpo"`.
    `fastalign.losses.simpo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def fused_linear_sppo(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    beta: float = 0.1,
    length_normalised: Collection[str] | None = None,
    cu_seqlens: Tensor | None = None,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    nll_weight: float = 0.0,
    nll_targets: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = -100,
    memory_budget: int | None = None,
    backend: Backend = "auto",
) -> PreferenceOutput:
    """Self-play preference optimisation (SPPO), with a win probability of 1 for chosen and 0 for rejected.

        L = (u - 1 / (2 beta))^2 + (v + 1 / (2 beta))^2

    TRL calls it `sppo_hard`.

    Computed from hidden states: the mean over B pairs, as `fused_linear_preference` with `loss_type="sppo"`.
    `fastalign.losses.sppo` describes the options of the loss and names its paper.
    `fused_linear_preference` describes all other arguments.
    """

def have_target(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Which positions are scored: a bool tensor shaped like `targets`, True everywhere if `ignore_index` is None."""
