"""The state of torch that kernels run in."""

from __future__ import annotations

import torch

from fastalign.ops.backends.launch import without_autocast


def test_autocast_is_off_inside_and_on_again_outside():
    @without_autocast
    def product(a, b, *, scale):
        """Documented."""
        return (a @ b) * scale

    a, b = torch.randn(3, 40), torch.randn(40, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert (a @ b).dtype == torch.bfloat16
        assert product(a, b, scale=2.0).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert product.__doc__ == "Documented."
