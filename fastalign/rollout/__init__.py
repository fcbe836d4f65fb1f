"""Completions of prompts."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.rollout.in_process import generate as generate

lazy_exports(
    __name__,
    {
        "generate": "fastalign.rollout.in_process",
    },
)
