"""Completions of prompts, with their log-probs."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.rollout.engine import Engine as Engine
    from fastalign.rollout.engine import Rollout as Rollout
    from fastalign.rollout.engine import Sampling as Sampling
    from fastalign.rollout.in_process import InProcess as InProcess
    from fastalign.rollout.in_process import generate as generate
    from fastalign.rollout.in_process import stop_tokens as stop_tokens

lazy_exports(
    __name__,
    {
        "Engine": "fastalign.rollout.engine",
        "InProcess": "fastalign.rollout.in_process",
        "Rollout": "fastalign.rollout.engine",
        "Sampling": "fastalign.rollout.engine",
        "generate": "fastalign.rollout.in_process",
        "stop_tokens": "fastalign.rollout.in_process",
    },
)
