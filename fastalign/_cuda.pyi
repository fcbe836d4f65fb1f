"""The CUDA module as type checkers see it. csrc/bindings_cuda.cpp defines it; only fastalign.ops calls it."""

from typing import Any

def __getattr__(name: str) -> Any: ...
