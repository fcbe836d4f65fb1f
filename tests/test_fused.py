"""The drop-in calls against the losses on log-probabilities from the float64 reference, in both layouts."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import fastalign
from fastalign import fused, reference
from fastalign.errors import InputError
from fastalign.losses import (
    LENGTH_NORMALISED,
    PAIRWISE,
    REFERENCE_FREE,
    UNPAIRED,
    PairLoss,
    bco,
    kto,
    loss_function,
    options_of,
    pairwise_loss,
)
from fastalign.losses.checks import check_logprobs

B, T, H, V = 3, 7, 5, 19
# Of each padded row: where its completion starts and ends.
SPANS = [(1, 4), (2, 7), (0, 1), (3, 7), (1, 2), (2, 5)]


def problem():
    """hidden (2B, T, H), weight, targets (2B, T), nll_targets with the prompts, ref_logps (2B,), all random float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * B, T, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(V, (2 * B, T), generator=generator)
    targets, nll_targets = torch.full_like(tokens, -100), torch.full_like(tokens, -100)
    for row, (start, end) in enumerate(SPANS):
        targets[row, start:end], nll_targets[row, :end] = tokens[row, start:end], tokens[row, :end]
    ref_logps = -10 * torch.rand(2 * B, generator=generator, dtype=torch.float64)
    return hidden, weight, targets, nll_targets, ref_logps


def by_hand(hidden, weight, targets, **head):
    """(2B,) sums and lengths of the padded rows, from the materialised logits."""
    logprobs = reference.linear_logprobs(hidden, weight, targets, **head)
    return logprobs.sum(1), (targets != -100).sum(1)


def packed(hidden, targets, *others):
    """The same rows as scored tokens only, c0 r0 c1 r1 ..., with their cu_seqlens; `others` are per sequence."""
    order = [row for pair in range(B) for row in (pair, B + pair)]
    rows = [(row, slice(*SPANS[row])) for row in order]
    cu_seqlens = torch.tensor([0] + [end - start for start, end in (SPANS[row] for row in order)]).cumsum(0)
    packed_hidden = torch.cat([hidden[row, span] for row, span in rows])
    return packed_hidden, torch.cat([targets[row, span] for row, span in rows]), cu_seqlens, *(o[order] for o in others)


def assert_same_gradients(loss, expected, *inputs):
    for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", PAIRWISE)
def test_each_loss(name, layout):
    hidden, weight, targets, _, ref = problem()
    sums, lengths = by_hand(hidden, weight, targets)
    free = name in REFERENCE_FREE
    scale = lengths if name in LENGTH_NORMALISED else torch.ones_like(lengths)
    logprobs = [*(sums / scale).split(B), *(() if free else (ref / scale).split(B))]
    nll = -sums[:B].sum() / lengths[:B].sum()
    expected = PAIRWISE[name].function(*logprobs, beta=0.3).mean() + (nll if name in ("cpo", "orpo") else 0.0)

    call = getattr(fastalign, f"fused_linear_{name}")
    if layout == "padded":
        out = call(hidden, weight, targets, beta=0.3, **({} if free else {"ref_logps": ref}))
    else:
        rows, row_targets, cu_seqlens, row_ref = packed(hidden, targets, ref)
        out = call(rows, weight, row_targets, cu_seqlens=cu_seqlens, beta=0.3,
                   **({} if free else {"ref_logps": row_ref}))  # fmt: skip
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([*out[1:3]], [*sums.detach().split(B)], rtol=1e-12, atol=1e-12)
    rewards = 0.3 * (sums - (0 if free else ref)).detach()
    torch.testing.assert_close([*out[3:5]], [*rewards.split(B)], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.nll, nll.detach(), rtol=1e-12, atol=1e-12)
    assert out.loss.shape == () and not any(t.requires_grad for t in out[1:])
    assert_same_gradients(out.loss, expected, hidden, weight)


def test_every_loss_has_its_own_defaults():
    hidden, weight, targets, _, ref = problem()
    for name in PAIRWISE:
        references = {} if name in REFERENCE_FREE else {"ref_logps": ref}
        out = getattr(fastalign, f"fused_linear_{name}")(hidden, weight, targets, **references)
        rewards = options_of(name)["beta"] * (out.chosen_logps - (0 if name in REFERENCE_FREE else ref[:B]))
        torch.testing.assert_close(out.chosen_rewards, rewards)


def test_ipo_on_sums():
    hidden, weight, targets, _, ref = problem()
    sums, _ = by_hand(hidden, weight, targets)
    out = fastalign.fused_linear_ipo(hidden, weight, targets, ref_logps=ref, length_normalised=())
    torch.testing.assert_close(out.loss, PAIRWISE["ipo"].function(*sums.split(B), *ref.split(B)).mean())


def test_mixture_with_an_nll_term():
    hidden, weight, targets, _, ref = problem()
    mixture = {"loss_type": ["sigmoid", "bco_pair", "simpo"], "loss_weights": [0.8, 0.2, 0.5]}
    sums, lengths = by_hand(hidden, weight, targets)
    losses = pairwise_loss(
        *mixture.values(), *sums.split(B), *ref.split(B), lengths_chosen=lengths[:B], lengths_rejected=lengths[B:],
        options={"beta": 0.2, "gamma_beta_ratio": 0.1},
    )  # fmt: skip
    expected = losses.mean() - 0.7 * sums[:B].sum() / lengths[:B].sum()
    out = fastalign.fused_linear_preference(
        hidden, weight, targets, **mixture, ref_logps=ref, nll_weight=0.7, beta=0.2, gamma_beta_ratio=0.1
    )
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(out.loss, expected, hidden, weight)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("own_head", [True, False], ids=["its own head", "the policy's head"])
def test_reference_from_hidden_states(own_head, layout):
    hidden, weight, targets, _, _ = problem()
    bias = torch.linspace(-1, 1, V, dtype=torch.float64, requires_grad=True)
    head = {"logit_scale": 0.5, "softcap": 4.0, "temperature": 1.5}
    ref_hidden, ref_weight, ref_bias = hidden.detach().flip(2), weight.detach() * 0.9 - 0.1, bias.detach() / 3
    ref_head = {"ref_weight": ref_weight, "ref_bias": ref_bias} if own_head else {}
    ref, _ = by_hand(
        ref_hidden, ref_weight if own_head else weight, targets, bias=ref_bias if own_head else bias, **head
    )
    sums, _ = by_hand(hidden, weight, targets, bias=bias, **head)
    expected = PAIRWISE["dpo"].function(*sums.split(B), *ref.detach().split(B)).mean()
    if layout == "padded":
        out = fastalign.fused_linear_dpo(hidden, weight, targets, bias=bias, ref_hidden=ref_hidden, **ref_head, **head)
    else:
        rows, row_targets, cu_seqlens = packed(hidden, targets)
        ref_rows = packed(ref_hidden, targets)[0]
        out = fastalign.fused_linear_dpo(
            rows, weight, row_targets, cu_seqlens=cu_seqlens, bias=bias, ref_hidden=ref_rows, **ref_head, **head
        )
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(out.loss, expected, hidden, weight, bias)


def test_a_policy_at_its_reference_has_margin_zero_exactly():
    hidden, weight, targets, _, _ = problem()
    out = fastalign.fused_linear_dpo(hidden, weight, targets, ref_hidden=hidden)
    assert not out.chosen_rewards.any() and not out.rejected_rewards.any()
    assert out.loss.item() == -torch.nn.functional.logsigmoid(torch.zeros((), dtype=torch.float64)).item()


def test_nll_over_prompt_and_completion():
    hidden, weight, targets, nll_targets, _ = problem()
    sums, lengths = by_hand(hidden, weight, targets)
    nll_sums, nll_lengths = by_hand(hidden, weight, nll_targets)
    nll = -nll_sums[:B].sum() / nll_lengths[:B].sum()
    expected = PAIRWISE["orpo"].function(*(sums / lengths).split(B)).mean() + nll
    out = fastalign.fused_linear_orpo(hidden, weight, targets, nll_targets=nll_targets)
    torch.testing.assert_close([out.loss, out.nll], [expected, nll.detach()], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close([*out[1:3]], [*sums.detach().split(B)], rtol=1e-12, atol=1e-12)
    assert_same_gradients(out.loss, expected, hidden, weight)

    # Packed rows hold the prompt once in each sequence here, and the same numbers come out.
    order = [0, 3, 1, 4, 2, 5]
    cu_seqlens = torch.arange(2 * B + 1) * T
    flat = [t[order].flatten(0, 1) for t in (hidden, targets, nll_targets)]
    again = fastalign.fused_linear_orpo(flat[0], weight, flat[1], nll_targets=flat[2], cu_seqlens=cu_seqlens)
    torch.testing.assert_close([*again], [*out], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("call", "loss", "options"),
    [
        (fastalign.fused_linear_kto, kto, {"kl": 0.4, "beta": 0.3, "weights": (1.5, 0.5)}),
        (fastalign.fused_linear_bco, bco, {"delta": 0.4, "beta": 0.3}),
    ],
    ids=["kto", "bco"],
)
def test_unpaired_losses(call, loss, options, layout):
    hidden, weight, targets, _, ref = problem()
    labels = torch.tensor([True, False, False, True, True])
    hidden_5, targets_5 = hidden[:5], targets[:5]
    sums, _ = by_hand(hidden_5, weight, targets_5)
    shift = options.get("kl", options.get("delta"))
    rest = {key: value for key, value in options.items() if key not in ("kl", "delta")}
    expected = loss(sums, ref[:5], labels, shift, **rest).mean()
    if layout == "padded":
        out = call(hidden_5, weight, targets_5, labels, ref_logps=ref[:5], **options)
    else:
        kept = targets_5 >= 0
        cu_seqlens = torch.tensor([0, *kept.sum(1).tolist()]).cumsum(0)
        out = call(hidden_5[kept], weight, targets_5[kept], labels, cu_seqlens=cu_seqlens, ref_logps=ref[:5], **options)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.logps, sums.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.rewards, 0.3 * (sums.detach() - ref[:5]), rtol=1e-12, atol=1e-12)
    assert_same_gradients(out.loss, expected, hidden, weight)


def test_sft_is_the_mean_and_micro_batches_add_up_to_it():
    hidden, weight, targets, _, _ = problem()
    logprobs = reference.linear_logprobs(hidden, weight, targets)
    count = (targets >= 0).sum()
    expected = -logprobs.sum() / count
    loss = fastalign.fused_linear_sft(hidden, weight, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    assert_same_gradients(loss, expected, hidden, weight)
    parts = [
        fastalign.fused_linear_sft(hidden[i : i + 1], weight, targets[i : i + 1], num_items=count) for i in range(6)
    ]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-12, atol=1e-12)
    seven = targets.masked_fill(targets < 0, 7)
    logprobs = reference.linear_logprobs(hidden, weight, seven, ignore_index=7)
    loss = fastalign.fused_linear_sft(hidden, weight, seven, ignore_index=7)
    torch.testing.assert_close(loss, -logprobs.sum() / (seven != 7).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("nll", [False, True], ids=["", "nll_targets"])
def test_without_an_ignore_index_every_position_is_scored(nll, layout):
    hidden, weight, _, _, ref = problem()
    targets, options = torch.arange(2 * B * T).view(2 * B, T) % V, {"ref_logps": ref, "nll_weight": 0.5}
    if layout == "packed":
        options["cu_seqlens"] = torch.arange(2 * B + 1) * T
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if nll:
        options["nll_targets"] = targets
    expected = fastalign.fused_linear_dpo(hidden, weight, targets, **options)
    out = fastalign.fused_linear_dpo(hidden, weight, targets, ignore_index=None, **options)
    assert all(map(torch.equal, out, expected))
    assert_same_gradients(out.loss, expected.loss, hidden, weight)


def test_sft_without_an_ignore_index():
    hidden, weight, *_ = problem()
    targets = torch.arange(2 * B * T).view(2 * B, T) % V
    expected = fastalign.fused_linear_sft(hidden, weight, targets)
    loss = fastalign.fused_linear_sft(hidden, weight, targets, ignore_index=None)
    assert torch.equal(loss, expected)
    assert_same_gradients(loss, expected, hidden, weight)


def test_low_precision_hidden_and_head():
    hidden, weight, targets, _, ref = problem()
    low = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16()
    out = fastalign.fused_linear_dpo(*low, targets, ref_logps=ref.float())
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and low[0].grad.dtype == torch.bfloat16
    sums, _ = by_hand(low[0].double(), low[1].double(), targets)
    # H rounded products a logit, at most T of them a sequence, and the sums themselves are rounded.
    bound = torch.finfo(torch.float32).eps * T * (2 * H * low[0].abs().max() * low[1].abs().max() + sums.abs().max())
    assert (out.chosen_logps - sums[:B]).abs().max() <= bound


def broken(name):
    hidden, weight, targets, nll_targets, ref = problem()
    cu_seqlens = packed(hidden, targets)[2]
    padded = {"hidden": hidden, "targets": targets, "ref_logps": ref}
    rows = dict(zip(("hidden", "targets", "cu_seqlens", "ref_logps"), packed(hidden, targets, ref), strict=True))
    arguments, *words = {
        "odd rows": (padded | {"hidden": hidden[1:], "targets": targets[1:]}, "5 sequences", "chosen and a rejected"),
        "no rows": (padded | {"hidden": hidden[:0], "targets": targets[:0]}, "0 sequences"),
        "packed without offsets": (rows | {"cu_seqlens": None}, "(17,)", "cu_seqlens None", "(2B + 1,)"),
        "padded with offsets": (padded | {"cu_seqlens": cu_seqlens}, "(6, 7)", "cu_seqlens (7,)", "without cu_seqlens"),
        "targets of another length": (padded | {"targets": targets[:, 1:]}, "(6, 7, 5)", "(6, 6)"),
        "offsets that miss the end": (rows | {"cu_seqlens": cu_seqlens - (cu_seqlens > 16).long()}, "from 0 to 17"),
        "no reference": (padded | {"ref_logps": None}, "both None", "pass one of them"),
        "two references": (padded | {"ref_hidden": hidden}, "both given", "pass one of them"),
        "reference of B": (padded | {"ref_logps": ref[:B]}, "(3,)", "(6,)", "per sequence"),
        "reference in bfloat16": (padded | {"ref_logps": ref.bfloat16()}, "torch.bfloat16", "float32"),
        "reference for simpo": (padded | {"loss_type": "simpo"}, "simpo", "no reference", "leave it out"),
        "misspelt option": (padded | {"bta": 0.1}, "'bta'", "did you mean 'beta'"),
        "misspelt argument": (padded | {"tempreature": 1.0}, "'tempreature'", "did you mean 'temperature'"),
        "another loss's option": (padded | {"discopop_tau": 0.1}, "'discopop_tau'", "not one of dpo"),
        "unknown loss": (padded | {"loss_type": "sigmiod"}, "'sigmiod'", "'sigmoid'"),
        "nll_targets of another shape": (padded | {"nll_targets": nll_targets[:B]}, "(3, 7)", "(6, 7)"),
        "nll_targets not shifted alike": (padded | {"nll_targets": nll_targets.roll(1, 1)}, "differs", "shifted alike"),
    }[name]  # fmt: skip
    return {"weight": weight} | arguments, words


@pytest.mark.parametrize(
    "name",
    ["odd rows", "no rows", "packed without offsets", "padded with offsets", "targets of another length",
     "offsets that miss the end", "no reference", "two references", "reference of B", "reference in bfloat16",
     "reference for simpo", "misspelt option", "misspelt argument", "another loss's option", "unknown loss",
     "nll_targets of another shape", "nll_targets not shifted alike"],
)  # fmt: skip
def test_errors_say_what_was_found_and_what_to_do(name):
    arguments, words = broken(name)
    with pytest.raises(InputError) as error:
        fastalign.fused_linear_preference(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


HEAD = ["logit_scale", "softcap", "temperature", "ignore_index", "memory_budget", "backend"]
REFERENCE = ["ref_logps", "ref_hidden", "ref_weight", "ref_bias"]


@pytest.mark.parametrize("name", [*PAIRWISE, *UNPAIRED])
def test_the_signature_shows_the_options_of_the_loss_and_every_other_argument(name):
    function = getattr(fastalign, f"fused_linear_{name}")
    parameters = inspect.signature(function).parameters
    shared = ["cu_seqlens", "bias", *([] if name in REFERENCE_FREE else REFERENCE)]
    if name in UNPAIRED:
        expected = ["hidden", "weight", "targets", "labels", "delta" if name == "bco" else "kl"]
        expected += [*options_of(name), *shared, *HEAD]
    else:
        expected = ["hidden", "weight", "targets", *options_of(name)]
        expected += ["length_normalised", *shared, "nll_weight", "nll_targets", *HEAD]
        assert parameters["nll_weight"].default == (1.0 if name in ("cpo", "orpo") else 0.0)
    assert list(parameters) == expected
    assert {key: parameters[key].default for key in options_of(name)} == options_of(name)
    assert function.__name__ == f"fused_linear_{name}" and function.__module__ == "fastalign.fused"
    assert f"losses.{loss_function(name).__name__}" in function.__doc__ and "\n    L = " in function.__doc__
    assert getattr(fastalign, f"fused_linear_{name}") is function


@pytest.mark.parametrize("name", [*PAIRWISE, *UNPAIRED])
def test_an_unknown_option_is_refused_with_the_nearest_one(name):
    hidden, weight, targets, _, ref = problem()
    labels = {"labels": torch.ones(2 * B, dtype=torch.bool)} if name in UNPAIRED else {}
    with pytest.raises(InputError, match=f"option 'bta' is not one of {name}; did you mean 'beta'"):
        getattr(fastalign, f"fused_linear_{name}")(hidden, weight, targets, **labels, ref_logps=ref, bta=0.1)


def test_a_new_loss_is_a_function_and_a_row(monkeypatch):
    # Before the row is added: the help text of `loss_type` lists the losses that are there at the import.
    from fastalign.config import PreferenceConfig

    def toy(chosen, rejected, *, beta: float = 0.7, label_smoothing: float = 0.0):
        """A toy.

        L = beta (rejected - chosen)
        """
        check_logprobs(beta, label_smoothing, chosen=chosen, rejected=rejected)
        return beta * (rejected - chosen)

    monkeypatch.setitem(
        PAIRWISE, "toy", PairLoss(toy, reference=False, averaged=True, nll_weight=0.5, aliases=("trl_toy",))
    )
    hidden, weight, targets, _, ref = problem()
    sums, lengths = by_hand(hidden, weight, targets)
    averages, nll = (sums / lengths).split(B), -sums[:B].sum() / lengths[:B].sum()

    assert "fused_linear_toy" in dir(fastalign)
    call = fused.fused_linear_toy
    assert "ref_logps" not in inspect.signature(call).parameters
    assert inspect.signature(call).parameters["beta"].default == 0.7
    out = call(hidden, weight, targets)
    torch.testing.assert_close(out.loss, toy(*averages).mean() + 0.5 * nll, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.chosen_rewards, 0.7 * sums[:B].detach(), rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="take no reference"):
        call(hidden, weight, targets, ref_logps=ref)

    mixed = pairwise_loss(
        ["trl_toy", "dpo"], [2.0, 1.0], *sums.split(B), *ref.split(B), lengths_chosen=lengths[:B],
        lengths_rejected=lengths[B:], options={"beta": 0.2},
    )  # fmt: skip
    expected = 2 * toy(*averages, beta=0.2) + PAIRWISE["dpo"].function(*sums.split(B), *ref.split(B), beta=0.2)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)

    config = PreferenceConfig(loss_type="trl_toy", label_smoothing=0.1)
    assert config.loss_type == ["toy"] and config.loss_options == {"label_smoothing": 0.1}
    assert (config.reward_beta, config.nll_coefficient, config.needs_reference) == (0.7, 0.5, False)


class Annotation(str):
    """An annotation that a signature shows without quotes."""

    __repr__ = str.__str__


def stub() -> str:
    """The text of fused.pyi: what this module has at run time, as type checkers and editors can read it."""
    names = [name for name in dir(fused) if name.startswith("fused_linear_")]
    outputs = [fused.PreferenceOutput, fused.UnpairedOutput]
    lines = [
        '"""The functions of fused.py, those that it makes from the table of losses included. Written by a test."""',
        "",
        "from collections.abc import Collection, Sequence",
        "from typing import Any, NamedTuple",
        "",
        "from torch import Tensor",
        "",
        "from fastalign.ops.backends.pick import Backend",
        "",
        f"__all__ = {sorted([*names, *(output.__name__ for output in outputs)])}",
    ]
    for output in outputs:
        lines += [f"class {output.__name__}(NamedTuple):", f'    """{output.__doc__}"""', ""]
        lines += [f"    {field}: {annotation.__forward_arg__}" for field, annotation in output.__annotations__.items()]
    for name in [*names, "have_target"]:
        function = getattr(fused, name)
        signature = inspect.signature(function)
        shown = [p.replace(annotation=Annotation(p.annotation)) for p in signature.parameters.values()]
        signature = signature.replace(parameters=shown, return_annotation=Annotation(signature.return_annotation))
        documentation = inspect.getdoc(function)
        end = "\n" if "\n" in documentation else ""
        documentation = textwrap.indent(f'"""{documentation}{end}"""', "    ")
        lines += [f"def {name}{signature}:", documentation]
    return "\n".join(lines) + "\n"


def test_editors_and_type_checkers_see_every_function(generated):
    path = Path(fused.__file__).with_suffix(".pyi")
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", path, "-"]
    formatted = subprocess.run(ruff, input=stub(), capture_output=True, text=True, check=True, cwd=path.parent)
    generated(path, formatted.stdout)


@pytest.mark.parametrize("call", ["fused_linear_dpo", "fused_linear_kto", "fused_linear_sft"])
@pytest.mark.parametrize("shifted", ["hidden", "targets"])
def test_where_only_one_was_shifted_the_error_says_so(call, shifted):
    hidden, weight, targets, _, ref = problem()
    options = {"labels": torch.ones(2 * B, dtype=torch.bool)} if call == "fused_linear_kto" else {}
    options |= {} if call == "fused_linear_sft" else {"ref_logps": ref}
    if shifted == "hidden":
        hidden, remedy = hidden[:, :-1], r"pass targets\[\.\.\., 1:\]"
    else:
        targets, remedy = targets[:, 1:], r"pass hidden\[\.\.\., :-1, :\]"
    with pytest.raises(InputError, match=rf"is the token that hidden\[\.\.\., t\] predicts, the next one: {remedy}"):
        getattr(fastalign, call)(hidden, weight, targets, **options)


@pytest.mark.parametrize("call", ["fused_linear_orpo", "fused_linear_kto"])
def test_offsets_in_int32_as_flash_attention_has_them(call):
    hidden, weight, targets, _, ref = problem()
    rows, row_targets, cu_seqlens, row_ref = packed(hidden, targets, ref)
    options = {}
    if call == "fused_linear_kto":
        options = {"labels": torch.arange(2 * B) % 2 == 0, "ref_logps": row_ref}
    out, expected = (
        getattr(fastalign, call)(rows, weight, row_targets, cu_seqlens=offsets, **options)
        for offsets in (cu_seqlens.int(), cu_seqlens)
    )
    assert all(map(torch.equal, out, expected))
    assert_same_gradients(out.loss, expected.loss, hidden, weight)
