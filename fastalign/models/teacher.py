"""Distillation as a regulariser: whom the model learns from, live or by top-k log-probs computed once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastalign.data.batching import batch_rows
from fastalign.data.keys import cache_folder, row_keys
from fastalign.data.packing import lay_out
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.files import KeyedTensors, write_keyed
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head
from fastalign.models.loading import load_model, load_tokenizer, tokenizer_beside
from fastalign.models.scoring import prepare
from fastalign.models.snapshot import fingerprint
from fastalign.models.vocabulary import check_vocabulary, vocabulary_digest
from fastalign.reference import linear_logits

_ROWS = 128  # of logits at a time, when a teacher's top k is looked for


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
    for batch in tqdm(list(batch_rows(dataset, range(len(keys)))), desc="teacher", unit="batch", leave=False):
        rows = [dataset[i] for i in batch]
        hidden, head = teacher(rows)
        head = head.first(len(teacher.tokenizer))  # no token has the entries behind it, which pad the matrix
        logprobs, indices = _topk(hidden, head, k, temperature)
        bounds = lay_out(rows, teacher.layout, teacher.pad_token_id).cu_seqlens.tolist()
        flat = [key for i in batch for key in keys[i]]
        for key, start, end in zip(flat, bounds[:-1], bounds[1:], strict=True):
            found[key] = indices[start:end], logprobs[start:end]
    values = {
        "indices": [indices.numpy() for indices, _ in found.values()],
        "logprobs": [logprobs.numpy() for _, logprobs in found.values()],
    }
    metadata = {"temperature": repr(float(temperature)), "vocabulary": vocabulary_digest(teacher.tokenizer)}
    write_keyed(path, list(found), values, metadata)
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
        try:
            self.stored = KeyedTensors(self.path, ["indices", "logprobs"])
        except DataError as error:
            raise DataError(f"The teacher's log-probs {error}: store them again.") from error

    def check(self, tokenizer: PreTrainedTokenizerBase, temperature: float, dataset) -> None:
        """ModelError, ConfigError or DataError unless the file is for this vocabulary, temperature and data."""
        metadata, stored = self.stored.metadata, f"The teacher's log-probs {self.path}"
        if metadata.get("vocabulary") != vocabulary_digest(tokenizer):
            raise ModelError(
                f"{stored} were stored with another tokenizer than the student's: store them again, from a teacher "
                "with the student's tokenizer."
            )
        if float(metadata["temperature"]) != temperature:
            raise ConfigError(
                f"{stored} are at temperature {metadata['temperature']}, but Distillation's is {temperature:g}: set "
                "the same, or store them again"
            )
        missing = sum(any(key not in self.stored for key in row_keys(row)) for row in dataset)
        if missing:
            raise DataError(
                f"{stored} lack {missing:,} of {len(dataset):,} training rows: store them again for this data set."
            )

    def __call__(self, rows: list[dict]) -> tuple[Tensor, Tensor]:
        """The k entries (S, k) int64 and their log-probs (S, k) at the rows' scored tokens."""
        keys = [key for row in rows for key in row_keys(row)]
        indices, logprobs = (
            torch.cat([torch.from_numpy(self.stored.read(name, key)) for key in keys])
            for name in ("indices", "logprobs")
        )
        return indices.long(), logprobs
