"""Completions of prompts."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.rollout.in_process import generate as generate
    from fastalign.rollout.in_process import stop_tokens as stop_tokens

lazy_exports(
    __name__,
    {
        "generate": "fastalign.rollout.in_process",
        "stop_tokens": "fastalign.rollout.in_process",
    },
)
