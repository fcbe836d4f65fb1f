"""Distillation as a regulariser: whom the model learns from, live or by top-k log-probs computed once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastalign.config import one_of
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.losses.distillation import distillation
from fastalign.models import load_model, load_tokenizer, tokenizer_beside
from fastalign.objectives import Metrics
from fastalign.ops.sparse_divergence import sparse_divergence
from fastalign.reference import DIVERGENCES, linear_logits
from fastalign.reference_logprobs import by_tokens, cache_folder, fingerprint, row_keys
from fastalign.regularizers import Step, Term, check_positive, count_of, mean_divergence
from fastalign.scoring import Head, causal_lm, lay_out, output_head, prepare

_ROWS = 128  # of logits at a time, when a teacher's top k is looked for


@dataclass
class Distillation:
    """`a L + (1 - a) tau^2 D`: the objective L mixed with the divergence from a teacher at temperature tau.

    teacher: "start", the weights that training starts from; a model, or what `load_model` takes; or a .safetensors file
        of top-k log-probs (`store_topk`). It must have the student's vocabulary, which is checked by its tokenizer; a
        model that was loaded from no local folder has none, and must have no fewer entries.
    weight: a, from 0 (the teacher alone) to below 1. D is the mean over the completions' tokens, over all the
        tokenizer's entries (not what pads the matrix); of a stored teacher over its k entries and the rest as one.
    divergence: forward_kl `KL(teacher || student)` (Hinton et al. 2015, arXiv:1503.02531), reverse_kl
        `KL(student || teacher)`, or jsd with `jsd_beta`, the teacher's share (Agarwal et al. 2024, arXiv:2306.13649).
    top_k: compute the teacher's k largest log-probs of every training token once, keep them in `cache_dir` (default
        ~/.cache/fastalign) by token ids and weights, and let the teacher go. None: ask it at every step.
    """

    teacher: str | PreTrainedModel
    weight: float = 0.5
    temperature: float = 1.0
    divergence: str = "forward_kl"
    jsd_beta: float = 0.5
    top_k: int | None = None
    cache_dir: str | None = None

    def __post_init__(self):
        check_positive("Distillation", temperature=self.temperature, top_k=1 if self.top_k is None else self.top_k)
        one_of("divergence", self.divergence, DIVERGENCES)
        if not 0 <= self.weight < 1:
            raise ConfigError(f"weight of Distillation is {self.weight}; it must be 0 or more, and below 1")

    def start(self, trainer) -> Term:
        ask, vocabulary = self._source(trainer), len(trainer.processing_class)
        options = {"divergence": self.divergence, "jsd_beta": self.jsd_beta, "temperature": self.temperature}

        def term(step: Step) -> tuple[Tensor, Metrics]:
            hidden = step.completions(step.scores.hidden)
            # Entries behind the tokenizer's pad the matrix. A live teacher's are cut to as many, a stored one's were.
            head = output_head(causal_lm(step.model)).first(vocabulary)
            loss = ask(step, hidden, head, options)
            # of the model's own samples only the teacher's opinion counts
            align = torch.zeros_like(step.loss) if step.batch.sampled else step.loss
            mixed = distillation(align, loss, weight=self.weight, temperature=self.temperature)
            # the objective is in the sum already
            return mixed - step.loss, {"distillation": (loss * step.totals.scored, count_of(hidden))}

        return term

    def _source(self, trainer) -> Callable[[Step, Tensor, Head, dict], Tensor]:
        """A function from a micro-batch to its part of the mean divergence from the teacher."""
        if self.teacher == "start":
            if self.top_k is not None:
                raise ConfigError(
                    "top_k of Distillation is for a teacher of its own; leave it out with teacher='start'"
                )
            trainer.keep_start()
            return _from_start
        if str(self.teacher).endswith(".safetensors"):
            return _from_store(self.teacher, self.temperature, trainer)
        teacher = Teacher.load(self.teacher, trainer)
        if self.top_k is None:
            return _from_teacher(teacher)
        path = store_topk(teacher, trainer.train_dataset, self.top_k, self.temperature, self.cache_dir)
        return _from_store(path, self.temperature, trainer)


def _from_start(step: Step, hidden: Tensor, head: Head, options: dict) -> Tensor:
    scores, start = step.at_start()
    return mean_divergence(hidden, head, step.completions(scores.hidden), start, step, 1.0, **options)


def _from_teacher(teacher: Teacher) -> Callable:
    def ask(step: Step, hidden: Tensor, head: Head, options: dict) -> Tensor:
        return mean_divergence(hidden, head, *teacher(step.batch.rows), step, 1.0, **options)

    return ask


def _from_store(path: str | Path, temperature: float, trainer) -> Callable:
    stored = TopK(path)
    stored.check(trainer.processing_class, temperature, trainer.train_dataset)

    def ask(step: Step, hidden: Tensor, head: Head, options: dict) -> Tensor:
        indices, logprobs = stored(step.batch.rows)
        weights = (1 / step.totals.scored).expand(hidden.shape[0])
        return sparse_divergence(
            hidden, head.weight, indices.to(hidden.device), logprobs.to(hidden.device), token_weights=weights,
            **head.options(), **options,
        ).sum()  # fmt: skip

    return ask


class Teacher:
    """A frozen model that answers with the hidden states and the output layer of its next-token distributions."""

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.layout = prepare(model)
        self.pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0

    @classmethod
    def load(cls, source: str | Path | nn.Module, trainer) -> Teacher:
        """The teacher of a trainer's model, on its device; ModelError where their vocabularies differ."""
        tokenizer = trainer.processing_class
        if isinstance(source, nn.Module):
            if causal_lm(source) is causal_lm(trainer.model):
                raise ConfigError("The teacher is the model that is trained; for its start, set teacher='start'")
            known = causal_lm(source).get_input_embeddings().weight.shape[0]
            if known < len(tokenizer):
                raise ModelError(
                    f"The teacher knows {known:,} tokens and the student's tokenizer has {len(tokenizer):,}: they have "
                    "different tokenizers. Distil from a teacher with the student's."
                )
            folder = causal_lm(source).name_or_path  # what it was loaded from; "" for a model made in memory
            if folder and (known_tokenizer := tokenizer_beside(folder)) is not None:
                check_vocabulary(tokenizer, known_tokenizer)
        else:
            check_vocabulary(tokenizer, load_tokenizer(source))
            source = load_model(source)
        return cls(source.to(trainer.args.device), tokenizer)

    @torch.no_grad()
    def __call__(self, rows: list[dict]) -> tuple[Tensor, Head]:
        """(S, G) hidden states that predict the rows' scored tokens, in their order, and the output layer."""
        packed = lay_out(rows, self.layout, self.pad_token_id).to(self.model.device)
        return self.model(packed=packed, keep_hidden=True).hidden, output_head(causal_lm(self.model)).detach()


def check_vocabulary(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, names: tuple[str, str] = ("student", "teacher")
) -> None:
    """ModelError unless both tokenizers give every token the same number."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return
    differ = [token for token in ours if ours[token] != theirs.get(token)] or [t for t in theirs if t not in ours]
    token = differ[0]
    raise ModelError(
        f"The {names[0]} and the {names[1]} have different tokenizers: {len(differ):,} of {len(ours):,} tokens differ "
        f"({token!r} is {ours.get(token, 'unknown')} to the {names[0]} and {theirs.get(token, 'unknown')} to the "
        f"{names[1]}). Use models that share one."
    )


def store_topk(
    teacher: Teacher, dataset, k: int, temperature: float = 1.0, cache_dir: str | Path | None = None
) -> Path:
    """A safetensors file of the teacher's k largest log-probs at every scored token of a tokenised data set.

    It is named by the teacher's weights, k, temperature and the rows, and not computed again where it is there.
    Tensors: keys (C, 16) uint8 of the completions, offsets (C + 1,), indices (T, k) int32, logprobs (T, k) float32, of
    the softmax over the whole vocabulary at that temperature.
    """
    if k > len(teacher.tokenizer):
        raise ConfigError(f"top_k of Distillation is {k}, but the vocabulary has {len(teacher.tokenizer):,} entries")
    keys = [row_keys(row) for row in dataset]
    rows_digest = hashlib.blake2b(b"".join(key for row in keys for key in row), digest_size=8).hexdigest()
    name = f"{fingerprint(teacher.model)}-{rows_digest}-top{k}-t{temperature:g}.safetensors"
    path = cache_folder(cache_dir) / "teachers" / name
    if path.exists():
        return path
    found: dict[bytes, tuple[Tensor, Tensor]] = {}
    for batch in tqdm(list(by_tokens(dataset, range(len(keys)))), desc="teacher", unit="batch", leave=False):
        rows = [dataset[i] for i in batch]
        hidden, head = teacher(rows)
        head = head.first(len(teacher.tokenizer))  # no token has the entries behind it, which pad the matrix
        logprobs, indices = _topk(hidden, head, k, temperature)
        bounds = lay_out(rows, teacher.layout, teacher.pad_token_id).cu_seqlens.tolist()
        flat = [key for i in batch for key in keys[i]]
        for key, start, end in zip(flat, bounds[:-1], bounds[1:], strict=True):
            found[key] = indices[start:end], logprobs[start:end]
    tensors = {
        "keys": torch.frombuffer(bytearray(b"".join(found)), dtype=torch.uint8).view(len(found), -1),
        "offsets": torch.tensor([0, *(len(indices) for indices, _ in found.values())]).cumsum(0),
        "indices": torch.cat([indices for indices, _ in found.values()]),
        "logprobs": torch.cat([logprobs for _, logprobs in found.values()]),
    }
    metadata = {"temperature": repr(float(temperature)), "vocabulary": _vocabulary(teacher.tokenizer)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, metadata)
    os.replace(temporary, path)
    return path


@torch.no_grad()
def _topk(hidden: Tensor, head: Head, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    parts = [
        linear_logits(part, head.weight, temperature=temperature, **head.options()).log_softmax(-1).topk(k)
        for part in hidden.split(_ROWS)
    ]
    return torch.cat([p.values.float().cpu() for p in parts]), torch.cat([p.indices.int().cpu() for p in parts])


class TopK:
    """A file that `store_topk` wrote, read span by span."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        stored = f"The teacher's log-probs {self.path}"
        try:
            self.file = safe_open(self.path, "pt")
            keys, offsets = self.file.get_tensor("keys"), self.file.get_tensor("offsets").tolist()
            self.indices, self.logprobs = self.file.get_slice("indices"), self.file.get_slice("logprobs")
        except Exception as error:  # the library has no common one for missing and damaged files
            raise DataError(f"{stored} cannot be read ({' '.join(str(error).split())}): store them again.") from error
        self.spans = {bytes(key.tolist()): span for key, span in zip(keys, pairwise(offsets), strict=True)}

    def check(self, tokenizer: PreTrainedTokenizerBase, temperature: float, dataset) -> None:
        """ModelError, ConfigError or DataError unless the file is for this vocabulary, temperature and data."""
        metadata, stored = self.file.metadata() or {}, f"The teacher's log-probs {self.path}"
        if metadata.get("vocabulary") != _vocabulary(tokenizer):
            raise ModelError(
                f"{stored} were stored with another tokenizer than the student's: store them again, from a teacher "
                "with the student's tokenizer."
            )
        if float(metadata["temperature"]) != temperature:
            raise ConfigError(
                f"{stored} are at temperature {metadata['temperature']}, but Distillation's is {temperature:g}: set "
                "the same, or store them again"
            )
        missing = sum(any(key not in self.spans for key in row_keys(row)) for row in dataset)
        if missing:
            raise DataError(
                f"{stored} lack {missing:,} of {len(dataset):,} training rows: store them again for this data set."
            )

    def __call__(self, rows: list[dict]) -> tuple[Tensor, Tensor]:
        """The k entries (S, k) int64 and their log-probs (S, k) at the rows' scored tokens."""
        spans = [self.spans[key] for row in rows for key in row_keys(row)]
        indices = torch.cat([self.indices[start:end] for start, end in spans])
        return indices.long(), torch.cat([self.logprobs[start:end] for start, end in spans])


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    return hashlib.blake2b(repr(sorted(tokenizer.get_vocab().items())).encode(), digest_size=16).hexdigest()
