"""Memory that is given back: the weights stay, the pages go."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastalign.models.freed import release_freed_memory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is resident")


def resident(kind: str) -> int:
    """Bytes of one kind (RssAnon, RssFile) that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def test_pages_of_a_mapped_file_go_and_come_back_as_they_were(tmp_path):
    values = torch.arange(8_000_000, dtype=torch.float32)
    save_file({"w": values}, tmp_path / "w.safetensors")
    mapped = safe_open(tmp_path / "w.safetensors", "pt").get_tensor("w")
    assert torch.equal(mapped, values)
    mapped[:1000] = -1  # a page of our own, which is in no file
    before = resident("RssFile")
    release_freed_memory()
    assert before - resident("RssFile") > 0.9 * values.nbytes
    assert torch.equal(mapped[1000:], values[1000:]) and (mapped[:1000] == -1).all()


def test_freed_blocks_below_a_used_one_go():
    blocks = [torch.ones(10_000) for _ in range(2_000)]  # 40 kB each: in the heap, not mapped one by one
    last = torch.ones(10_000)
    before = resident("RssAnon")
    blocks.clear()
    release_freed_memory()
    assert before - resident("RssAnon") > 60_000_000 and last.sum() == 10_000
