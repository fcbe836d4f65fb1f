"""Everything that fastalign knows of peft: adapters around a model and on its layers.

This is the only module that imports peft, or reads the attributes that peft puts on a module. peft is slow to import,
so it is imported inside the functions that need it: a run without an adapter never pays for it.

peft builds its layers at run time and gives them attributes (`lora_A`, `active_adapters`, ...) that no type checker
sees. Such a layer is therefore annotated as `Any` here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastalign.errors import ModelError

if TYPE_CHECKING:
    from peft import LoraConfig as LoraConfig
    from peft import PeftConfig as PeftConfig
    from peft import PeftModel as PeftModel

# Kinds of adapters -> why they are refused.
_UNSUPPORTED = {
    "ADALORA": "moves ranks between layers after every step, by a call that the Trainer does not make",
}


class Lora(NamedTuple):
    """One LoRA adapter on a layer. The layer computes with `weight + scaling * b a`.

    References:
        Hu et al. 2021, arXiv:2106.09685.
    """

    name: str
    base: Any  # the layer that the adapter is on
    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    scaling: float
    dropout: float  # probability that an input of the adapter is dropped while training
    is_plain: bool  # nothing but `scaling * b a`: neither a bias nor a variant such as DoRA
    is_transposed: bool  # the layer stores its weight as (in, out), as GPT-2's Conv1D does


# Models


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside the wrappers of DDP, accelerate and peft."""
    inner = _without_module_wrappers(model)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def has_adapter(model: Any) -> bool:
    """Whether peft has put an adapter on the model; peft marks the PeftModel and the model inside it."""
    return hasattr(model, "peft_config")


def add_adapter(model: nn.Module, config: PeftConfig, seed: int) -> nn.Module:
    """Puts a new adapter on a model.

    Args:
        model: the model, changed in place.
        config: peft's configuration of the adapter.
        seed: of the adapter's random numbers. The Trainer sets a seed too, but only after the adapter was made.

    Returns:
        The PeftModel around the model.

    Raises:
        ModelError: the configuration names layers that the model does not have, or does not fit it otherwise.
    """
    from peft import PeftConfig, get_peft_model
    from transformers import set_seed  # its module imports peft too

    if not isinstance(config, PeftConfig):
        raise ModelError(f"peft_config is a {type(config).__name__}; pass a peft.LoraConfig(...).")
    check_adapter_kind(config)
    _check_saved_modules(model, config)
    set_seed(seed)
    try:
        return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]  # peft wants a PreTrainedModel
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)})
        raise ModelError(
            f"The adapter does not fit {type(model).__name__}: {' '.join(str(error).split())} Its linear layers are "
            f"{', '.join(names) or 'none'}."
        ) from error


def check_adapter_kind(config: Any) -> None:
    """ModelError for a kind of adapter that a packed batch or the Trainer has no place for."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        raise ModelError(
            f"The adapter type {kind} adds virtual tokens to every sequence, which packed batches have no place for: "
            "use LoRA."
        )
    if kind in _UNSUPPORTED:
        raise ModelError(f"The adapter type {kind} {_UNSUPPORTED[kind]}: use LoRA.")
    if getattr(config, "alora_invocation_tokens", None):
        raise ModelError(
            "alora_invocation_tokens is set: such an adapter looks for these tokens in every sequence, and in a packed "
            "row it would find those of another: use plain LoRA."
        )


def _check_saved_modules(model: Any, config: Any) -> None:
    """ModelError for a whole layer that is trained beside the adapter in float32, under a model of 16 bits."""
    names, low = getattr(config, "modules_to_save", None), (torch.bfloat16, torch.float16)
    if hasattr(model, "score"):  # a reward model multiplies its score layer in float32 in any case
        names = [name for name in names or () if name != "score"]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    if names and dtype in low:
        raise ModelError(
            f"modules_to_save is {list(names)}: these layers would be trained in float32, but the model computes in "
            f"{dtype}: load the model with dtype='float32', or put an adapter on them through target_modules."
        )


def lora_config(*, rank: int, alpha: int, dropout: float = 0.0, targets: str = "all-linear") -> LoraConfig:
    """The configuration of a LoRA adapter for a causal language model, as peft takes it.

    Args:
        rank: r of the factors (r, in) and (out, r).
        alpha: the adapter is scaled by `alpha / rank`.
        dropout: probability that an input of the adapter is dropped while training.
        targets: "all-linear", names of layers joined by commas, or "default": the layers that peft chooses by the
            architecture, as it does for TRL.
    """
    from peft import LoraConfig

    modules = targets if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    if targets == "default":
        modules = None
    return LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=modules, task_type="CAUSAL_LM")


def check_packable(model: nn.Module) -> None:
    """Refuses a model whose adapter is of a kind that `check_adapter_kind` refuses.

    Raises:
        ModelError: The model has such an adapter.
    """
    inner = _without_module_wrappers(model)
    if hasattr(inner, "get_base_model"):
        check_adapter_kind(inner.active_peft_config)


def _without_module_wrappers(model: Any) -> Any:
    while hasattr(model, "module"):
        model = model.module
    return model


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The model with the adapter that a folder holds, which is switched on.

    Args:
        model: the base model; peft puts the adapter's layers into it.
        folder: an adapter that was saved as safetensors.

    Raises:
        ModelError: the adapter cannot be read, or it does not fit the model.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder)
    except Exception as error:  # peft has no common error for adapters that do not fit
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"The adapter {folder} does not fit {model.name_or_path or 'the model'}: {reason}") from error


def adapter_base(source: str | Path) -> str | None:
    """What an adapter folder names as its base model; None if the source is no adapter folder.

    If the base model is not where the adapter says, `base` inside the folder and next to it is tried: a run that was
    moved took its merged base model along.

    Raises:
        ModelError: the folder's adapter_config.json cannot be read, or names no base model.
    """
    folder = Path(source).expanduser()
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").exists():  # with config.json it is a whole model
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"The adapter's configuration {path} cannot be read: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(f"{path} names no base_model_name_or_path: write the base model of the adapter there.")
    moved = [other for other in (folder / "base", folder.parent / "base") if other.is_dir()]
    return str(moved[0]) if Path(base).is_absolute() and not Path(base).exists() and moved else base


def merge_adapter(model: Any) -> Any:
    """The model with its active adapters merged into its weights, in the dtype of the weights. All can be trained.

    Args:
        model: a PeftModel. It is changed in place and no longer usable: use what is returned.

    Raises:
        ModelError: the adapter cannot be merged, or the weights are quantised, which would round the sum anew.
    """
    if not hasattr(model, "merge_and_unload"):
        raise ModelError(
            f"{type(model).__name__} holds an adapter that cannot be merged into its weights: give the adapter's "
            "folder, or a PeftModel with LoRA."
        )
    if getattr(model.get_base_model(), "is_quantized", False):
        raise ModelError(
            "The weights are quantised, so that merging the adapter would round them anew: load the model with "
            "dtype='bfloat16' or 'float32' instead, or train the adapter further (adapter='continue')."
        )
    try:
        merged = model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError(f"The adapter cannot be merged: {' '.join(str(error).split())}") from error
    return merged.requires_grad_(True)


def merged_state(model: Any) -> dict[str, Tensor]:
    """The state dict of the model inside a PeftModel, with its adapter merged. The model itself is not changed.

    Raises:
        ModelError: the adapter does more than add `s B A` to weights.
    """
    base, state = model.get_base_model(), {}
    for name, value in base.state_dict().items():
        if is_adapter_name(name) or ".original_module." in name:
            continue
        plain = name.replace(".base_layer.", ".").replace(f".modules_to_save.{model.active_adapter}.", ".")
        state[plain] = value
    for name, lora in lora_layers(base):
        if not lora.is_plain or name not in state:
            raise ModelError(f"The adapter on {name} has a bias or is a LoRA variant, which cannot be merged.")
        delta = lora.scaling * (lora.b @ lora.a)
        state[name] = (state[name].float() + (delta.t() if lora.is_transposed else delta)).to(state[name].dtype)
    dtype = next(iter(state.values())).dtype  # a layer that was trained as a whole is float32 beside 16-bit weights
    return {name: value.detach().to(dtype) if value.is_floating_point() else value for name, value in state.items()}


def train_adapter(model: Any) -> None:
    """Lets the active adapter be trained if nothing is: peft loads adapters frozen."""
    if hasattr(model, "set_adapter") and not any(p.requires_grad for p in model.parameters()):
        model.set_adapter(model.active_adapter)


# Names and settings


def plain_name(name: str) -> str:
    """A parameter's name in the model itself: without the prefix and the `base_layer` that peft adds to it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def is_adapter_name(name: str) -> bool:
    """Whether a parameter, buffer or module of this name belongs to a LoRA adapter."""
    return "lora_" in name


def is_trained_rows_name(name: str) -> bool:
    """Whether a parameter of this name holds trained rows of an embedding, see `trained_rows`."""
    return "trainable_tokens_delta" in name


def changes_nothing(state: Mapping[str, Tensor]) -> bool:
    """Whether the LoRA adapters in a state dict leave the model as it is: every B is 0, as in a new adapter.

    An adapter on an embedding starts with A = 0 and a random B instead. It is rare, so it always counts as a change.
    """
    lora = {name: value for name, value in state.items() if is_adapter_name(name)}
    return not any("lora_embedding" in name or ("lora_B" in name and value.any()) for name, value in lora.items())


def adapter_settings(model: nn.Module) -> list[tuple]:
    """What decides an adapter's effect besides its tensors: per layer its scaling, active adapters, and if disabled."""
    modules: list[Any] = list(model.modules())
    layers = [layer for layer in modules if isinstance(getattr(layer, "scaling", None), dict)]
    return [(sorted(layer.scaling.items()), layer.active_adapters, layer.disable_adapters) for layer in layers]


# Layers


def lora_base(module: Any) -> nn.Module | None:
    """The layer inside peft's LoRA; None for other modules. Attributes decide, so peft stays unimported."""
    is_lora = hasattr(module, "lora_A") and hasattr(module, "lora_variant")
    return getattr(module, "base_layer", None) if is_lora else None


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Lora]]:
    """Every LoRA adapter of the model, active or not, with the plain name of the weight that it is on."""
    for name, layer in model.named_modules():
        for adapter in getattr(layer, "lora_A", None) or ():
            yield plain_name(f"{name}.weight"), _lora(layer, adapter)


def unwrap_layer(layer: Any) -> tuple[Any, list[Lora]]:
    """The layer inside what peft wrapped around it, and the adapters that add to its output now.

    Args:
        layer: the output layer of a model.

    Returns:
        The plain layer, and its adapters. The list is empty where they are disabled, or merged into the weight.

    Raises:
        ModelError: the layer has an adapter of another kind than LoRA, whose effect on the weight is not known here.
    """
    if (rows := _row_adapter(layer)) is not None:  # see `trained_rows`
        return unwrap_layer(rows.base_layer)
    if hasattr(layer, "modules_to_save"):  # peft trains a copy of the whole layer
        copies = layer.modules_to_save
        return unwrap_layer(layer.original_module if layer.disable_adapters else copies[layer.active_adapters[0]])
    if not hasattr(layer, "base_layer"):
        return layer, []
    if not hasattr(layer, "lora_A"):
        raise ModelError(
            f"The output layer has an adapter of the kind {type(layer).__module__}, which fastalign cannot fold into "
            "its weight: use LoRA, or leave the output layer out of target_modules."
        )
    inner, adapters = unwrap_layer(layer.base_layer)
    if not (layer.disable_adapters or layer.merged):
        adapters += [_lora(layer, name) for name in layer.active_adapters if name in layer.lora_A]
    return inner, adapters


def trained_rows(layer: Any) -> tuple[Tensor, Tensor] | None:
    """The rows of an output layer that peft trains in place of the layer's own (`trainable_token_indices`).

    Returns:
        Token ids (k,) and rows (k, H); None where there are none, or they are switched off or merged.
    """
    while layer is not None:
        rows = _row_adapter(layer)
        if rows is not None and not (rows.disable_adapters or rows.merged) and rows.active_adapters:
            parts = [rows.trainable_tokens_delta[name] for name in rows.active_adapters]
            ids = [i for name in rows.active_adapters for i in rows.token_indices[name]]
            return torch.tensor(ids, device=parts[0].device), parts[0] if len(parts) == 1 else torch.cat(parts)
        layer = rows.base_layer if rows is not None else getattr(layer, "base_layer", None)
    return None


def _row_adapter(layer: Any) -> Any:
    """The layer of peft that replaces rows, which may stand inside another wrapper; None for layers without one."""
    inner = getattr(layer, "token_adapter", layer)
    return inner if hasattr(inner, "trainable_tokens_delta") else None


def fusible_lora(layer: Any) -> Lora | None:
    """The active adapter of a LoRA layer if it can be added inside the layer's product, else None.

    That needs exactly one active adapter that adds `scaling * b a` to a frozen weight and does nothing else: no
    dropout, bias or variant, and no hook on one of the parts, since a fused product would not call it. Adapters that
    are disabled for the moment are returned as well (see `is_disabled`).
    """
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(active) != 1 or layer.merged or layer.base_layer.weight.requires_grad:
        return None
    lora = _lora(layer, active[0])
    if not lora.is_plain or (layer.training and lora.dropout > 0):
        return None
    parts = (layer.base_layer, layer.lora_A[lora.name], layer.lora_B[lora.name])
    return None if any(map(is_hooked, parts)) else lora


def is_disabled(layer: Any) -> bool:
    """Whether the adapters on a layer are switched off, as they are while the base model is the reference."""
    return layer.disable_adapters


def _lora(layer: Any, name: str) -> Lora:
    b = layer.lora_B[name]
    return Lora(
        name, layer.base_layer, layer.lora_A[name].weight, b.weight, layer.scaling[name],
        dropout=getattr(layer.lora_dropout[name], "p", 0.0),
        is_plain=name not in getattr(layer, "lora_variant", ()) and b.bias is None,
        is_transposed=getattr(layer, "fan_in_fan_out", False),
    )  # fmt: skip


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook waits for the module's calls or gradients."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before or after or module._backward_pre_hooks or module._backward_hooks)
