"""The CUDA kernels, compiled from csrc/bindings_cuda.cpp; only fastalign.ops calls them. A type checker sees that they exist."""

from typing import Any

def __getattr__(name: str) -> Any: ...
