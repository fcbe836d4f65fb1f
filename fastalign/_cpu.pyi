"""The native CPU module as type checkers see it. csrc/bindings_cpu.cpp defines it; a checkout may not be built."""

from typing import Any

def __getattr__(name: str) -> Any: ...
