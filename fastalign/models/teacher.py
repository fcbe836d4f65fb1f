"""Teachers of distillation: a live model, or its top-k log-probs, computed once and read from a file.

Teacher(rows)                    -> hidden states and output layer, computed at every step
store_topk(teacher, data, k)     -> a file, computed once
TopK(file)(rows)                 -> the k entries and their log-probs, read at every step
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from fastalign.data.batching import batch_rows
from fastalign.data.keyed_parts import own_part, write_parts
from fastalign.data.keys import cache_folder, row_keys
from fastalign.data.packing import Layout, lay_out
from fastalign.data.processes import gather_objects
from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.files import KeyedTensors, check_writable
from fastalign.models.adapters import causal_lm
from fastalign.models.head import Head, output_head
from fastalign.models.loading import load_model, load_tokenizer, tokenizer_beside
from fastalign.models.scoring import prepare
from fastalign.models.snapshot import fingerprint
from fastalign.models.vocabulary import check_vocabulary, embedding_rows, fill_token, vocabulary_digest
from fastalign.reference import linear_logits

_ROWS = 128  # rows of logits that exist at a time while a teacher's top k is computed


class Teacher:
    """A frozen model that gives the hidden states and the output layer of its next-token distributions.

    Args:
        model: a causal language model; it is prepared, frozen and put in evaluation mode, in place.
        tokenizer: that of the student, which has the same vocabulary.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.layout: Layout = prepare(model)
        self.pad_token_id = fill_token(tokenizer)

    @classmethod
    def load(cls, source: str | Path | nn.Module, trainer) -> Teacher:
        """Loads the teacher of a trainer's model and puts it on the trainer's device.

        Args:
            source: a model, or what `load_model` takes.
            trainer: gives the student, its tokenizer and the device.

        Raises:
            ConfigError: the teacher is the model that is trained.
            ModelError: the vocabularies differ, or the teacher cannot be loaded. The tokenizer of a model object is
                looked for in the local folder that it was loaded from. Without one it must have at least as many
                entries as the student's tokenizer.
        """
        tokenizer = trainer.processing_class
        if isinstance(source, nn.Module):
            if causal_lm(source) is causal_lm(trainer.model):
                raise ConfigError("The teacher is the model that is trained; for its start, set teacher='start'")
            known = embedding_rows(causal_lm(source))
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
        """Hidden states (S, G) that predict the rows' S scored tokens, in their order, and the output layer.

        Args:
            rows: tokenised, with `prompt_ids` and `completion_ids`.
        """
        packed = lay_out(rows, self.layout, self.pad_token_id).to(causal_lm(self.model).device)
        return self.model(packed=packed, keep_hidden=True).hidden, output_head(causal_lm(self.model)).detach()


def store_topk(
    teacher: Teacher,
    dataset,
    k: int,
    temperature: float = 1.0,
    cache_dir: str | Path | None = None,
    *,
    show: bool = True,
) -> Path:
    """Computes the teacher's k largest log-probs at every scored token of a data set, and stores them in a file.

    Its name is made of the teacher's weights, k, the temperature and the rows. If it exists, nothing is computed.
    Several processes compute a part of the rows each.

    Args:
        teacher: the model to ask.
        dataset: tokenised rows, with C different completions of prompts, and T scored tokens in them.
        k: entries stored per token.
        temperature: divides the logits before the softmax.
        cache_dir: folder of the file; None for ~/.cache/fastalign.
        show: whether a bar shows the progress.

    Returns:
        The path of a safetensors file with the tensors

        - keys (C, 16) uint8: a hash of each completion with its prompt,
        - offsets (C + 1,) int64: the scored tokens of each,
        - indices (T, k) int32: the entries with the largest log-probs,
        - logprobs (T, k) float32: their log-probs, in nats, of the softmax over the tokenizer's whole vocabulary.

    Raises:
        ConfigError: k is larger than the vocabulary.
    """
    if k > len(teacher.tokenizer):
        raise ConfigError(f"top_k of Distillation is {k}, but the vocabulary has {len(teacher.tokenizer):,} entries")
    keys = [row_keys(row) for row in dataset]
    rows_digest = hashlib.blake2b(b"".join(key for row in keys for key in row), digest_size=8).hexdigest()
    name = f"{fingerprint(teacher.model)}-{rows_digest}-top{k}-t{temperature:g}.safetensors"
    path = cache_folder(cache_dir) / "teachers" / name
    if all(gather_objects(path.exists())):
        return path
    check_writable("cache_dir", path.parent)
    found: dict[bytes, tuple[Tensor, Tensor]] = {}
    batches = own_part(list(batch_rows(dataset, range(len(keys)))))
    for batch in tqdm(batches, desc="teacher", unit="batch", leave=False, disable=not show):
        rows = [dataset[i] for i in batch]
        hidden, head = teacher(rows)
        head = head.first(len(teacher.tokenizer))  # entries beyond the tokenizer's are padding of the matrix
        logprobs, indices = _topk(hidden, head, k, temperature)
        bounds = lay_out(rows, teacher.layout, teacher.pad_token_id).cu_seqlens.tolist()
        flat = [key for i in batch for key in keys[i]]  # one key per completion, in the order of the batch
        for key, start, end in zip(flat, bounds[:-1], bounds[1:], strict=True):
            found[key] = indices[start:end], logprobs[start:end]
    values = {
        "indices": [indices.numpy() for indices, _ in found.values()],
        "logprobs": [logprobs.numpy() for _, logprobs in found.values()],
    }
    metadata = {"temperature": repr(float(temperature)), "vocabulary": vocabulary_digest(teacher.tokenizer)}
    write_parts(path, list(found), values, metadata)
    return path


@torch.no_grad()
def _topk(hidden: Tensor, head: Head, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The k largest log-probs (S, k) float32 of each row, and their entries (S, k) int32, on the CPU."""
    head = head.dense()
    parts = [
        linear_logits(part, head.dense_weight, temperature=temperature, **head.options()).log_softmax(-1).topk(k)
        for part in hidden.split(_ROWS)
    ]
    return torch.cat([p.values.float().cpu() for p in parts]), torch.cat([p.indices.int().cpu() for p in parts])


class TopK:
    """Reads a file that `store_topk` wrote, one completion at a time.

    Args:
        path: the safetensors file.

    Raises:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.stored = KeyedTensors(self.path, ["indices", "logprobs"])
        except DataError as error:
            raise DataError(f"The teacher's log-probs {error}: store them again.") from error

    def check(self, tokenizer: PreTrainedTokenizerBase, temperature: float, dataset) -> None:
        """Checks that the file was made for this vocabulary, temperature and data.

        Args:
            tokenizer: that of the student.
            temperature: that of the distillation.
            dataset: tokenised training rows.

        Raises:
            ModelError: another vocabulary.
            ConfigError: another temperature.
            DataError: rows that the file lacks.
        """
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
        """The k entries (S, k) int64 and their log-probs (S, k) float32 at the S scored tokens of tokenised rows."""
        keys = [key for row in rows for key in row_keys(row)]
        indices, logprobs = (
            torch.cat([torch.from_numpy(self.stored.read(name, key)) for key in keys])
            for name in ("indices", "logprobs")
        )
        return indices.long(), logprobs
