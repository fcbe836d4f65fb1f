"""The peak memory of a training step, part by part: arithmetic on shapes, without torch.

Letters: T tokens of a micro-batch, S of them scored, H hidden size, I the MLP's inner size, Q and K the widths of
queries and of keys, V the vocabulary, r the rank of an adapter, L layers, a bytes of an activation.

**What a layer keeps for the backward pass**, per token, read off `fastalign.models` and `fastalign.ops`:

- two norms keep their input, the linear layers after them the norms' output: 4 H,
- attention keeps queries, keys, values and its output, which is also the output projection's input: 2 Q + 2 K,
- SwiGLU keeps gate and up, and the down projection its input: 3 I (4 I where gate and up are one layer),
- each adapter keeps x A': r, seven times, or four times where layers are fused,
- the input of frozen layers without an adapter is not kept: H where neither queries, keys nor values have one, H where
  neither gate nor up has one, I where down has none,
- in float32: one number per norm, and one per head.

With checkpointing a layer keeps its input, H, and one layer at a time is computed again and has the rest.

**When the peak occurs.** Activations shrink during the backward pass while gradients grow. Both are linear in the
number of layers, so the most is held at one of the ends: before the first layer of the backward pass, or after the
last.
"""

from __future__ import annotations

from typing import NamedTuple

from fastalign.memory.shapes import Shapes

# Resident before any tensor is made. On the CPU: the interpreter, torch, transformers, peft (measured: 513 to 521 MB).
# On a GPU: the CUDA context with its libraries, which differs between drivers (assumed).
LIBRARIES = {"cpu": 520_000_000, "cuda": 600_000_000}
# Bytes that an optimiser keeps per trained parameter. Those in 8 bits keep a float32 scale per 256 numbers.
_8_BIT = 1 + 4 / 256
STATES = {"adamw": 8.0, "adam": 8.0, "lion": 4.0, "sgd": 0.0, "adamw_8bit": 2 * _8_BIT, "lion_8bit": _8_BIT}
_WEIGHT_TILE = {"cpu": 5 << 20, "cuda": 64 << 20}  # see `fastalign.ops.head.weights`
CACHE_BYTES = 1 << 30  # the default budget of cached probability tiles, see `fastalign.ops.linear_logprobs`


class Setting(NamedTuple):
    """What a run decides about its memory.

    Attributes:
        tokens: Tokens of one micro-batch.
        scored: Those of them that are scored. None: all.
        rank: Rank of the adapter; 0 trains all weights.
        targets: Names of the layers with an adapter, "lm_head" may be among them. None: every linear layer of the
            decoder layers.
        quantize_head: Whether the output layer is quantised too.
        size: Bytes of an unquantised weight, and of an activation.
        checkpointing: Whether activations are recomputed in the backward pass.
        quantization: "none", "nf4", "fp4" or "int8".
        double: Whether the scales of 4-bit weights are quantised too.
        optimizer: A name of `STATES`.
        device: "cpu" or "cuda".
        reference: Whether a copy of the trained weights is kept as the reference.
        accumulates: Whether gradients of earlier micro-batches lie beside the activations of later ones.
        memory_budget: Bytes of probability tiles that are cached for a trained output layer.
        bounded: Whether freed memory is given back at once, as `memory_limit` has it on a CPU.
    """

    tokens: int
    scored: int | None = None
    rank: int = 16
    size: int = 2
    checkpointing: bool = False
    quantization: str = "none"
    double: bool = False
    optimizer: str = "adamw"
    device: str = "cpu"
    reference: bool = False
    accumulates: bool = False
    memory_budget: int = CACHE_BYTES
    bounded: bool = False
    targets: tuple[str, ...] | None = None
    quantize_head: bool = False


def weight_bytes(shapes: Shapes, setting: Setting) -> int:
    """Bytes of the model's weights: embedding, norms and biases stay unquantised, and the head by default."""
    head = shapes.vocab * shapes.hidden if setting.quantize_head else 0
    packed, other = shapes.linear_parameters + head, (shapes.other_parameters - head) * setting.size
    if setting.quantization == "none":
        return packed * setting.size + other
    if setting.quantization == "int8":  # a byte per weight, and a float32 scale per row
        rows = shapes.layers * sum(o for _, o in shapes.linear) + (shapes.vocab if head else 0)
        return packed + 4 * rows + other
    # A scale per 64 weights: float32, or a byte and a float32 per 256 of them.
    scales = packed / 64 * (1 + 4 / 256 if setting.double else 4)
    return int(packed / 2 + scales) + other


def trained_parameters(shapes: Shapes, setting: Setting) -> int:
    """Parameters that have a gradient."""
    if not setting.rank:
        return shapes.parameters
    head = shapes.hidden + shapes.vocab if "lm_head" in (setting.targets or ()) else 0
    return setting.rank * (shapes.layers * sum(i + o for i, o in adapted(shapes, setting).values()) + head)


def adapted(shapes: Shapes, setting: Setting) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the linear layers of a decoder layer that have an adapter."""
    layers = dict(zip(shapes.names, shapes.linear, strict=True))
    return {name: sizes for name, sizes in layers.items() if setting.targets is None or name in setting.targets}


def _unkept_inputs(shapes: Shapes, setting: Setting) -> int:
    """How many numbers per token and layer need not be kept, because the layers that read them have no adapter."""
    if not setting.rank or setting.targets is None:
        return 0
    readers = {"qkv": shapes.hidden, "gate up": shapes.hidden, "down": shapes.inner}
    names = {"qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"), "gate up": ("gate_proj", "up_proj", "gate_up_proj"),
             "down": ("down_proj",)}  # fmt: skip
    return sum(size for part, size in readers.items() if not set(names[part]) & set(setting.targets))


def layer_bytes(shapes: Shapes, setting: Setting) -> int:
    """Bytes that one layer keeps for the backward pass without checkpointing."""
    h, q, k = shapes.hidden, shapes.queries, shapes.keys
    inner = (4 if shapes.fused else 3) * shapes.inner
    heads = q + k if shapes.head_norms else 0  # their norms keep their inputs
    per_token = inner + 4 * h + 2 * q + 2 * k + heads
    per_token += setting.rank * len(adapted(shapes, setting)) - _unkept_inputs(shapes, setting)
    return setting.tokens * (per_token * setting.size + 4 * (shapes.heads + 2))


def backward_bytes(shapes: Shapes, setting: Setting) -> int:
    """Bytes that the backward pass of one layer needs beside what was kept.

    Most are needed at the MLP. The gradients of down's output and of its input (H + I), of gate and up (2 I), and of
    the hidden state that passes by (H) exist at one time, beside copies of one weight: with an adapter the CPU
    appends its factor to the weight, which copies it, and a packed weight is dequantised before.
    """
    rows = setting.tokens * (3 * shapes.inner + 2 * shapes.hidden) * setting.size
    weight = max(i * o for i, o in shapes.linear)
    copies = (setting.rank > 0 and setting.size == 2 and setting.device == "cpu") + (setting.quantization != "none")
    return rows + copies * weight * setting.size


def head_bytes(shapes: Shapes, setting: Setting) -> int:
    """Bytes of the output layer's op: tiles, the gradient of the hidden states, and cached tiles of a trained layer."""
    scored = setting.tokens if setting.scored is None else setting.scored
    tile = 8 << 20 if setting.device == "cpu" else 16 << 20
    rows = scored * shapes.hidden * (4 + setting.size)
    in_parts = setting.quantize_head or "lm_head" in (setting.targets or ())  # then it is read in tiles of its weight
    tiles = 2 * tile + (_WEIGHT_TILE[setting.device] if in_parts else 0)
    return tiles + rows + (0 if setting.rank else min(scored * shapes.vocab * 4, setting.memory_budget))


def parts(
    shapes: Shapes, setting: Setting, *, weights: int | None = None, trained: int | None = None
) -> dict[str, int]:
    """Bytes per part at the peak of a training step; their sum is the peak.

    Args:
        shapes: Those of the model.
        setting: What the run decides.
        weights: Bytes of all weights, adapters among them, where a loaded model was counted. None: by the shapes.
        trained: Trained parameters, where a loaded model was counted. None: by the shapes.

    Returns:
        Name of the part -> bytes, at the moment when most is held.
    """
    trained = trained_parameters(shapes, setting) if trained is None else trained
    layer = layer_bytes(shapes, setting)
    kept = shapes.layers * layer
    if setting.checkpointing:
        kept = shapes.layers * setting.tokens * shapes.hidden * setting.size + layer
    head, temporaries = head_bytes(shapes, setting), backward_bytes(shapes, setting)
    embedding = 0 if setting.rank else 4 * shapes.vocab * shapes.hidden
    # (gradients, kept activations, temporaries, head) at both ends of the backward pass. At its start only the output
    # layer has a gradient. At its end the embedding's gradient is formed before it is added to what is there.
    begin = (4 * trained if setting.accumulates else embedding, kept, temporaries, head)
    end = (4 * trained, layer, max(temporaries, embedding), 0)
    gradients, activations, work, tiles = max(begin, end, key=sum)
    return {
        "weights": weight_bytes(shapes, setting) if weights is None else weights,
        "adapters": 4 * trained if setting.rank and weights is None else 0,
        "gradients": gradients,
        "optimiser": int(STATES[setting.optimizer] * trained),
        "kept activations": activations,
        "backward's temporaries": work,
        "head": tiles,
        "reference": (4 if setting.rank else setting.size) * trained if setting.reference else 0,
        # On a CPU the heap keeps what one phase has freed, and the next phase asks for blocks of other sizes: gradients
        # that the step has freed stay resident beside the activations of the next one.
        "allocator": min(kept, 4 * trained) if setting.device == "cpu" and not setting.bounded else 0,
        "libraries": LIBRARIES[setting.device],
    }
