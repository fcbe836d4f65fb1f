"""The memory that a training step needs, predicted and measured."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.memory.measure import peak_bytes as peak_bytes
    from fastalign.memory.measure import predict as predict

lazy_exports(
    __name__,
    {
        "peak_bytes": "fastalign.memory.measure",
        "predict": "fastalign.memory.measure",
    },
)
