"""What fits on one GPU: the table of docs/how-to/what-fits.md, for models of 0.1 to 70 billion parameters."""

from __future__ import annotations

from fastalign.memory.parts import Setting
from fastalign.memory.planning import longest
from fastalign.memory.shapes import Shapes

MODELS = {
    "SmolLM2-135M": Shapes(576, 1536, 30, 576, 192, 9, 49152, tied=True),
    "SmolLM2-360M": Shapes(960, 2560, 32, 960, 320, 15, 49152, tied=True),
    "Qwen2.5-0.5B": Shapes(896, 4864, 24, 896, 128, 14, 151936, tied=True, bias=True),
    "Llama-3.2-1B": Shapes(2048, 8192, 16, 2048, 512, 32, 128256, tied=True),
    "Llama-3.2-3B": Shapes(3072, 8192, 28, 3072, 1024, 24, 128256, tied=True),
    "Llama-3.1-8B": Shapes(4096, 14336, 32, 4096, 1024, 32, 128256, tied=False),
    "Qwen3-14B": Shapes(5120, 17408, 40, 5120, 1024, 40, 151936, tied=False, head_norms=True),
    "Qwen2.5-32B": Shapes(5120, 27648, 64, 5120, 1024, 40, 152064, tied=False, bias=True),
    "Llama-3.1-70B": Shapes(8192, 28672, 80, 8192, 1024, 64, 128256, tied=False),
}
MEMORY = (8, 12, 16, 24, 48, 80)  # GB, 10^9 bytes
_WAYS = {
    "All weights, float32, AdamW": Setting(1, rank=0, size=4, checkpointing=True, device="cuda"),
    "LoRA of rank 16, bfloat16": Setting(1, checkpointing=True, device="cuda"),
    "QLoRA of rank 16, nf4 with double quantisation": Setting(
        1, checkpointing=True, device="cuda", quantization="nf4", double=True
    ),
}
_LEAST = 256  # fewer tokens than this are no useful micro-batch


def tables() -> str:
    """A Markdown table per way to train: the most tokens of a micro-batch, per model and size of memory."""
    return "\n\n".join(f"### {way}\n\n{_table(setting)}" for way, setting in _WAYS.items())


def _table(setting: Setting) -> str:
    lines = [f"| model | {' | '.join(f'{size} GB' for size in MEMORY)} |", "| --- |" + " ---: |" * len(MEMORY)]
    for name, shapes in MODELS.items():
        cells = [_tokens(longest(shapes, setting, size * 10**9)) for size in MEMORY]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _tokens(count: int) -> str:
    if count < _LEAST:
        return "-"
    return f"{count // 1000:,}k" if count >= 10_000 else f"{count // 100 / 10:g}k"
