"""fastalign: post-training of language models on one memory-limited machine."""

from fastalign.ops import linear_logprobs, segment_sum, selective_logprobs

__version__ = "0.1.0"

__all__ = ["__version__", "linear_logprobs", "segment_sum", "selective_logprobs"]
