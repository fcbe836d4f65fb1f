"""Reward models: a causal language model's body with a score layer (1, H) instead of the output layer.

They are transformers' own classes, `AutoModelForSequenceClassification` with one label, so that a saved one loads
without fastalign. transformers reads the score at the last token that is not the padding token, wherever it stands.
If the padding token also ends answers, that is the token before the end, and the score is another one without any
error. So the padding token that is saved must be one that never ends an answer; see `choose_padding`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastalign.errors import ModelError
from fastalign.models.adapters import causal_lm, has_adapter, merged_state, unwrap_layer


def is_reward_model(model: nn.Module) -> bool:
    """Whether the model inside wrappers gives scores of sequences instead of logits of tokens."""
    base: Any = causal_lm(model)
    return hasattr(base, "score") and type(base).__name__.endswith("ForSequenceClassification")


def score_layer(model: Any) -> nn.Linear:
    """The layer (1, H) of a reward model that turns hidden states into scores: the one that is trained now."""
    return unwrap_layer(model.score)[0]


def with_score_layer(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A reward model with the body of a causal language model, which is not copied, and a new score layer.

    Args:
        model: The language model. Its body then belongs to both.
        seed: Of the score layer's random weights.

    Raises:
        ModelError: transformers has no class for it that reads one score per sequence.
    """
    kind: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(model.config), None)
    if kind is None:
        raise ModelError(
            f"transformers has no sequence classification for {type(model).__name__}, which a reward model is saved "
            "as: take another architecture."
        )
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.device("meta"):  # the body's weights are those of `model`, so none need memory here
        reward = kind(config)
    if not isinstance(getattr(reward, "score", None), nn.Linear) or reward.score.bias is not None:
        raise ModelError(f"{kind.__name__} has no plain score layer: take another architecture.")
    setattr(reward, reward.base_model_prefix, model.base_model)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(reward.score.weight.shape)
    weight.normal_(std=getattr(config, "initializer_range", 0.02), generator=generator)
    reward.score.weight = nn.Parameter(weight.to(model.device, model.dtype))
    reward.name_or_path = model.name_or_path
    return reward.train(model.training)


def is_reward_folder(source: str | Path) -> bool:
    """Whether a local folder holds a model of sequence classification."""
    try:
        config = json.loads((Path(source).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(str(name).endswith("ForSequenceClassification") for name in config.get("architectures") or ())


def load_reward_model(source: str | Path, *, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    """Loads a reward model from a folder.

    Args:
        source: The folder, with safetensors.
        dtype: Of the weights; "auto" takes the saved one.

    Raises:
        ModelError: The folder holds no reward model, or one with several labels.
    """
    if not is_reward_folder(source):
        raise ModelError(
            f"{source} holds no reward model (its config.json names no ...ForSequenceClassification): train one with "
            "`fastalign reward`."
        )
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            str(source), dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the libraries raise many kinds for damaged or missing files
        raise ModelError(f"The reward model {source} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    if model.config.num_labels != 1:
        raise ModelError(f"{source} has {model.config.num_labels} labels; a reward model has one score.")
    return model


def choose_padding(tokenizer: PreTrainedTokenizerBase, ends: Collection[int]) -> int:
    """The padding token of a reward model: one that never ends an answer.

    The tokenizer's padding token if it qualifies, else another special token: unknown, beginning of text, or any.

    Args:
        tokenizer: The model's.
        ends: Tokens that end answers in the data.

    Raises:
        ModelError: Every special token ends answers.
    """
    end: Any = tokenizer.eos_token_id  # a number, or None: transformers annotates lists too
    taken = {*ends, end}
    special: list[Any] = [tokenizer.pad_token_id, getattr(tokenizer, "unk_token_id", None), tokenizer.bos_token_id]
    special += sorted(tokenizer.all_special_ids)
    special += sorted(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)
    found = next((token for token in special if token is not None and token not in taken), None)
    if found is None:
        raise ModelError(
            "Every special token of the tokenizer ends answers, so none can be the padding of a reward model: "
            "transformers would read the score one token too early. Add one: "
            "tokenizer.add_special_tokens({'pad_token': '<|pad|>'}), and model.resize_token_embeddings(len(tokenizer))."
        )
    return found


def save_reward_model(model: Any, folder: str | Path) -> None:
    """Saves a reward model as plain transformers loads it. An adapter is merged into what is saved.

    Args:
        model: The reward model, or a PeftModel around one. It is not changed.
        folder: Where the files go.
    """
    base: Any = causal_lm(model)
    state = merged_state(model) if has_adapter(model) else base.state_dict()
    with torch.device("meta"):
        plain = type(base)(base.config)  # the class alone: peft's layers inside `base` would be saved by their names
    plain.save_pretrained(folder, state_dict={name: value.contiguous() for name, value in state.items()})
