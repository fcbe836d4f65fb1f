"""The peak memory that `fastalign plan` predicts beside the measured one: the table of docs/how-to/what-fits.md.

    python -m bench.suites.plan [--cell lora-1024-checkpointing ...]

A cell is one step of SmolLM2-135M on the CPU over one packed row: a prompt and two completions, half of the tokens
scored, AdamW whose moments a step before has made. Each runs in a fresh process that returns freed memory at once, as
`memory_limit` has it. What was resident after a step of a tiny model counts as libraries, and is taken off.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "full": {"rank": 0, "size": 4},
    "lora": {"rank": 16, "size": 2},
    "qlora": {"rank": 16, "size": 2, "quantization": "nf4", "double": True},
}
CELLS = {
    f"{kind}-{tokens}{'-checkpointing' * checkpointing}": (kind, tokens, checkpointing)
    for kind, tokens, checkpointing in product(KINDS, (512, 1024, 2048), (False, True))
}


def measure(kind: str, tokens: int, checkpointing: bool) -> int:
    """The peak of the second step in bytes, less what is resident after a step of a tiny model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fastalign.models.adapters import add_adapter, lora_config
    from fastalign.models.freed import release_freed_memory, return_freed_memory_at_once
    from fastalign.models.linear import limit_onednn_cache
    from fastalign.models.loading import load_model

    limit_onednn_cache()
    return_freed_memory_at_once()
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1, pad_token_id=0
    )
    tiny = LlamaForCausalLM(config).to(torch.float32 if kind == "full" else torch.bfloat16)
    _steps(tiny if kind == "full" else add_adapter(tiny, lora_config(rank=2, alpha=2), 0), 64, checkpointing)
    del tiny
    release_freed_memory()
    libraries = _status("VmRSS")
    dtype = "float32" if kind == "full" else "bfloat16"
    source = _as_folder() if kind == "qlora" else "smollm2-135m-instruct"
    more = {"quantization": "nf4", "double_quantization": True} if kind == "qlora" else {}
    model: Any = load_model(source, dtype=dtype, for_adapter=kind != "full", **more)
    if kind != "full":
        model = add_adapter(model, lora_config(rank=16, alpha=32), 0)
    release_freed_memory()
    return _steps(model, tokens, checkpointing) - libraries


def _steps(model: Any, tokens: int, checkpointing: bool) -> int:
    """Two steps of AdamW; the most that was resident during the second one."""
    import torch

    from fastalign.data.packing import lay_out
    from fastalign.models.adapters import causal_lm
    from fastalign.models.scoring import prepare

    layout = prepare(model)
    if checkpointing:
        causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)
    vocabulary = causal_lm(model).config.vocab_size
    ids = torch.randint(3, vocabulary, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    half, quarter = tokens // 2, tokens // 4
    row = {"prompt_ids": ids[:half], "completion_ids": [ids[half : half + quarter], ids[half + quarter :]]}
    batch = lay_out([row], layout, pad_token_id=0)
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak
        logprobs = model(packed=batch).logprobs
        (-torch.nn.functional.logsigmoid(0.1 * (logprobs[:quarter].sum() - logprobs[quarter:].sum()))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def _as_folder() -> str:
    """SmolLM2 as safetensors, which a GGUF file must become before it can be quantised."""
    from fastalign.models.loading import load_model

    folder = Path("runs/bench/smollm2-bf16")
    if not (folder / "config.json").is_file():
        load_model("smollm2-135m-instruct", dtype="bfloat16").save_pretrained(folder)
    return str(folder)


def predict(kind: str, tokens: int, checkpointing: bool) -> int:
    """What the plan predicts, less libraries."""
    from fastalign.memory.parts import Setting, parts
    from fastalign.memory.shapes import read_shapes

    setting = Setting(tokens, tokens // 2, checkpointing=checkpointing, bounded=True, **KINDS[kind])
    found = parts(read_shapes("smollm2-135m-instruct")[0], setting)
    return sum(found.values()) - found["libraries"]


def main() -> None:
    """Measures the cells, each in a process, and prints the rows of the table."""
    parser = argparse.ArgumentParser("python -m bench.suites.plan", description=__doc__)
    parser.add_argument("--cell", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--here", action="store_true", help="measure one cell in this process, and print its bytes")
    args = parser.parse_args()
    if args.here:
        print(measure(*CELLS[args.cell[0]]))
        return
    _as_folder()
    for name in args.cell:
        command = [sys.executable, "-m", "bench.suites.plan", "--here", "--cell", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured, predicted = int(done.stdout.split()[-1]) / 1e6, predict(*CELLS[name]) / 1e6
        kind, tokens, checkpointing = CELLS[name]
        off = f"{(predicted / measured - 1) * 100:+.1f}%"
        print(f"| {kind} | {tokens} | {'yes' if checkpointing else 'no'} | {predicted:.0f} | {measured:.0f} | {off} |")


if __name__ == "__main__":
    main()
