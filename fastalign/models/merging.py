"""An adapter merged into the weights of its base model, saved as a plain model, and held against the original.

merged weight = W + scaling * B A (LoRA, arXiv:2106.09685). The sum is formed in float32 and rounded once, to the dtype
that is saved. What is compared is the folder as it was written: it is loaded again, by transformers alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from fastalign.errors import ConfigError, ModelError, disk_error
from fastalign.models.adapters import adapter_base, merge_adapter
from fastalign.models.loading import load_model, load_tokenizer, load_with_adapter
from fastalign.models.runs import model_folder

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


def merge_run(source: str | Path, out: str | Path, *, dtype: str = "float32") -> Merged:
    """Writes the model of a run as one plain model: weights, configuration and tokenizer, without an adapter.

    Args:
        source: a run folder or the folder of an adapter. A model without adapter is written as it is.
        out: the folder to make. It must not exist, or be empty.
        dtype: of the saved weights: "float32", "bfloat16" or "float16".

    Returns:
        The folder, and the differences of the log-probabilities of a passage and of random tokens.

    Raises:
        ConfigError: `dtype` is unknown, or `out` holds something.
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
    load = load_with_adapter if is_adapter else load_model
    model: Any = load(folder, dtype="float32").eval()
    probes = _probes(tokenizer, model.config.get_text_config().vocab_size)
    before = [_logprobs(model, ids) for ids in probes]
    if is_adapter:
        model = merge_adapter(model)
    model = model.to(DTYPES[dtype])
    try:
        _save(model, tokenizer, out)
        del model
        again = AutoModelForCausalLM.from_pretrained(out, dtype=DTYPES[dtype], local_files_only=True).eval()
        off = torch.cat([(_logprobs(again, ids) - old).abs() for ids, old in zip(probes, before, strict=True)])
        if dtype == "float32" and not off.max() <= ALLOWED:
            raise ModelError(
                f"The merged model differs from {source} by {off.max():.2g} nats at a token, more than {ALLOWED:g}: "
                "its adapter changes something that a plain model cannot hold, so use it as an adapter."
            )
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise
    return Merged(out, is_adapter, off.max().item(), off.mean().item(), len(off))


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except (OSError, SafetensorError) as error:
        reason = disk_error(error) or " ".join(str(error).split())
        raise ConfigError(f"{out} cannot be written: {reason}; name another folder") from error


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
