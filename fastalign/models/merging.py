"""An adapter merged into the weights of its base model, saved as a plain model, and held against the original.

merged weight = W + scaling * B A (LoRA, arXiv:2106.09685). The sum is formed in float32 and rounded once, to the dtype
that is saved. What is compared is the folder as it was written: it is loaded again, by transformers alone.

An adapter that was trained on quantised weights knows those, not the ones that they were rounded from. So W is their
dequantised value. Quantising the sum again rounds the adapter away in part: SmolLM2's log-probabilities move by 0.2
nats per token in nf4, and by 0.01 where the sum is saved in bfloat16.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fastalign.errors import ConfigError, ModelError
from fastalign.files import read_json
from fastalign.models.adapters import adapter_base, load_adapter, merge_adapter
from fastalign.models.loading import forget_quantization, load_model, load_tokenizer, load_with_adapter
from fastalign.models.quantization import (
    compute_in_float32,
    dequantize_layers,
    stored_quantization,
    use_training_product,
)
from fastalign.models.runs import model_folder
from fastalign.models.scoring import prepare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWED = 1e-3  # nats per token; float32 sums in another order differ by about 1e-5
_PROBE = """The lighthouse keeper wrote down the weather every morning: wind, clouds, and how far she could see. \
"Three ships today," she told her brother, who asked why it mattered. 17 + 25 = 42, and nobody had checked the sum. \
def area(radius): return 3.14159 * radius ** 2"""


class Merged(NamedTuple):
    """What `merge_run` wrote, and how far it is from the model with its adapter."""

    folder: Path
    adapter: bool  # False: all weights were trained, so there was nothing to merge
    largest: float  # difference of a token's log-probability, in nats
    mean: float  # of the absolute differences
    tokens: int
    quantization: str  # of the weights that the adapter was trained on


def merge_run(source: str | Path, out: str | Path, *, dtype: str = "float32", requantise: bool = False) -> Merged:
    """Writes the model of a run as one plain model: weights, configuration and tokenizer, without an adapter.

    Args:
        source: a run folder or the folder of an adapter. A model without adapter is written as it is.
        out: the folder to make. It must not exist, or be empty.
        dtype: of the saved weights: "float32", "bfloat16" or "float16".
        requantise: quantises the merged weights again, as those were that the adapter was trained on.

    Returns:
        The folder, and the differences of the log-probabilities of a passage and of random tokens.

    Raises:
        ConfigError: `dtype` is unknown, `out` holds something, or there is no quantisation to repeat.
        ModelError: the model cannot be loaded or merged, or float32 weights differ by more than 1e-3 nats.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose from {', '.join(DTYPES)}")
    out = Path(out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already; name a folder that is empty or does not exist")
    folder = model_folder(source)
    tokenizer = load_tokenizer(folder)
    is_adapter = adapter_base(folder) is not None
    quantised = _quantization(source, folder) if is_adapter else {"quantization": "none"}
    if requantise and quantised["quantization"] == "none":
        raise ConfigError(f"--requantise is for an adapter on quantised weights, and {source} has none; leave it out")
    model = _load(folder, quantised, is_adapter)
    probes = _probes(tokenizer, model.config.get_text_config().vocab_size)
    before = [_logprobs(model, ids) for ids in probes]
    if is_adapter:
        model = merge_adapter(_dequantised(folder, quantised, model))
    model = model.to(DTYPES[dtype])
    try:
        _save(model, tokenizer, out)
        del model
        if requantise:
            _quantise_folder(out, tokenizer, quantised)
        again: Any = AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[dtype], local_files_only=True).eval()
        use_training_product(again)
        off = torch.cat([(_logprobs(again, ids) - old).abs() for ids, old in zip(probes, before, strict=True)])
        if dtype == "float32" and not requantise and not off.max() <= ALLOWED:
            raise ModelError(
                f"The merged model differs from {source} by {off.max():.2g} nats at a token, more than {ALLOWED:g}: "
                "its adapter changes something that a plain model cannot hold, so use it as an adapter."
            )
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Merged(out, is_adapter, off.max().item(), off.mean().item(), len(off), quantised["quantization"])


def _quantization(source: str | Path, folder: str | Path) -> dict[str, Any]:
    """The options of `load_model` with which the base of an adapter was quantised."""
    base = adapter_base(folder)
    config = Path(str(base)).expanduser() / "config.json"
    stored = read_json(config).get("quantization_config") if config.is_file() else None
    if stored is not None:
        return {**stored_quantization(stored), "stored": True}
    run = read_json(Path(source).expanduser() / "run.json")
    names = ("quantization", "double_quantization", "quantize_head", "dtype")
    return {"quantization": "none"} | {name: run[name] for name in names if name in run}


def _load(folder: str | Path, quantised: dict[str, Any], is_adapter: bool) -> Any:
    """The model with its adapter, computing in float32. Quantised weights are rounded as they were for the training."""
    if quantised["quantization"] == "none":
        return (load_with_adapter if is_adapter else load_model)(folder, dtype="float32").eval()
    model: Any = load_with_adapter(folder, **_load_options(quantised))
    compute_in_float32(model)
    prepare(model)
    return model.eval()


def _load_options(quantised: dict[str, Any]) -> dict[str, Any]:
    """Those of `load_model`; a base that was saved quantised is loaded as it was saved."""
    return {} if quantised.get("stored") else quantised


def _dequantised(folder: str | Path, quantised: dict[str, Any], model: Any) -> Any:
    """The adapter on a base whose quantised layers are in float32."""
    if quantised["quantization"] == "none":
        return model
    base: Any = load_model(str(adapter_base(folder)), **_load_options(quantised))
    dequantize_layers(base)
    forget_quantization(base)
    return load_adapter(base.float(), folder)


def _quantise_folder(out: Path, tokenizer: PreTrainedTokenizerBase, quantised: dict[str, Any]) -> None:
    """Puts the quantised model in the place of the one that was saved."""
    options = {name: value for name, value in quantised.items() if name not in ("stored", "dtype")}
    model = load_model(out, **options)
    aside = out.with_name(out.name + ".tmp")
    _save(model, tokenizer, aside)
    shutil.rmtree(out)
    aside.rename(out)


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror or error}; name another folder") from error


def _probes(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[Tensor]:
    """A passage and random tokens, (1, T) each: words that the model knows, and tokens that it seldom sees."""
    passage = torch.tensor([tokenizer(_PROBE)["input_ids"][:200]])
    generator = torch.Generator().manual_seed(0)
    return [passage, torch.randint(vocabulary, (1, 128), generator=generator)]


@torch.no_grad()
def _logprobs(model: Any, ids: Tensor) -> Tensor:
    """(T - 1,) float32: the log-probability of every token but the first."""
    logits = model(input_ids=ids.to(model.device)).logits[0, :-1].float()  # (T - 1, V)
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None].to(logits.device))[:, 0].cpu()
