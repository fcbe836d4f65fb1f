"""The shapes of a model's weights, read from its config.json. Nothing heavy is imported and no weight is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastalign.errors import ConfigError, ModelError


class Shapes(NamedTuple):
    """What memory depends on in a decoder of the llama family.

    Attributes:
        hidden: Size of the hidden states, H.
        inner: Size of the MLP's inner vectors, I.
        layers: Number of layers.
        queries: Heads times their size.
        keys: Key heads times their size.
        heads: Number of query heads.
        vocab: Number of tokens in the vocabulary.
        tied: Whether the output layer is the embedding.
        fused: Whether query, key and value are one layer, and gate and up another one (phi3).
        head_norms: Whether queries and keys are normalised (qwen3).
        bias: Whether the layers of query, key and value have biases (qwen2).
        lora_default: Whether peft has a default for the layers with an adapter: those of query and value.
    """

    hidden: int
    inner: int
    layers: int
    queries: int
    keys: int
    heads: int
    vocab: int
    tied: bool
    fused: bool = False
    head_norms: bool = False
    bias: bool = False
    lora_default: bool = True

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of every linear layer of one decoder layer."""
        h, i, q, k = self.hidden, self.inner, self.queries, self.keys
        first = [(h, q + 2 * k)] if self.fused else [(h, q), (h, k), (h, k)]
        mlp = [(h, 2 * i)] if self.fused else [(h, i), (h, i)]
        return [*first, (q, h), *mlp, (i, h)]

    @property
    def names(self) -> list[str]:
        """The names of the layers of `linear`, in its order."""
        if self.fused:
            return ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
        return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    @property
    def linear_parameters(self) -> int:
        """Parameters of the linear layers of all decoder layers, without biases: those that are quantised."""
        return self.layers * sum(i * o for i, o in self.linear)

    @property
    def other_parameters(self) -> int:
        """Parameters of embedding, output layer, norms and biases."""
        head = self.queries // self.heads
        norms = 2 * self.hidden + (2 * head if self.head_norms else 0)
        biases = self.queries + 2 * self.keys if self.bias else 0
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.layers * (norms + biases) + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear_parameters + self.other_parameters


# What differs from llama, per model_type: the properties of `Shapes`, and whether embeddings are tied by default.
_FAMILY: dict[str, dict[str, bool]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"bias": True},
    "qwen3": {"head_norms": True},
    "phi3": {"fused": True, "lora_default": False},
    "smollm3": {"tied": True, "lora_default": False},
}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The shapes that a config.json states.

    Args:
        config: The contents of config.json.

    Raises:
        ModelError: The architecture is not in the table, or a size is missing.
    """
    kind = config.get("model_type")
    if kind not in _FAMILY:
        raise ModelError(
            f"model_type is {kind!r}, whose memory cannot be planned; the table of parts knows {', '.join(_FAMILY)}"
        )
    family = dict(_FAMILY[kind])
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for name in names:
        if type(config.get(name)) is not int or config[name] < 1:
            raise ModelError(f"{name} of config.json is {config.get(name)!r}; it must be a whole number above 0")
    hidden, inner, layers, heads, vocab = (config[name] for name in names)
    key_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    tied = config.get("tie_word_embeddings")
    by_default = family.pop("tied", False)
    if kind == "llama":
        family["bias"] = bool(config.get("attention_bias"))
    return Shapes(
        hidden, inner, layers, heads * size, key_heads * size, heads, vocab,
        by_default if tied is None else bool(tied), **family,
    )  # fmt: skip


def read_shapes(model: str) -> tuple[Shapes, str | None]:
    """The shapes of a local model folder, and the quantisation that it was saved with, if any.

    Args:
        model: A folder that holds a config.json, or the packaged model smollm2-135m-instruct.

    Raises:
        ConfigError: There is no config.json there, or it is no JSON object.
        ModelError: See `shapes_of`.
    """
    if model == "smollm2-135m-instruct":  # a GGUF file without a config.json
        return Shapes(576, 1536, 30, 576, 192, 9, 49152, tied=True), None
    path = Path(model).expanduser() / "config.json"
    if not path.is_file():
        raise ConfigError(
            f"model is {model!r}, and there is no file {path}; plan needs a local model folder with its config.json "
            "(nothing is downloaded)"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}, where a JSON object was expected")
    stored = config.get("quantization_config")
    if isinstance(stored, dict):
        return shapes_of(config), str(stored.get("quant_method"))
    return shapes_of(config), None
