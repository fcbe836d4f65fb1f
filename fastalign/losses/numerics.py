"""The elementary functions that the losses are made of, accurate for arguments of any size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, elementwise: the log-probability that an event of log-probability x does not happen.

    Computed as written, the difference loses its digits at both ends: near x = 0 the exponential rounds to 1, and far
    below 0 it is too small to change the 1. Above -log 2 the function is therefore log(-expm1(x)), and below it
    log1p(-exp(x)).

    Args:
        x: Values below 0, of any shape and any floating dtype.

    Returns:
        A tensor like `x`; -inf where x is 0, nan where it is above 0.

    References:
        Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    near_zero = x > -math.log(2)
    # torch.where computes both branches, and the gradient of the branch that is not taken is multiplied by 0. An
    # infinite gradient would make nan of that, so each branch gets a harmless argument where the other one is taken.
    near, far = torch.where(near_zero, x, -1.0), torch.where(near_zero, -1.0, x)
    return torch.where(near_zero, torch.log(-torch.expm1(near)), torch.log1p(-torch.exp(far)))


def logistic_loss(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) log s(x) - eps log s(-x), with s the logistic sigmoid and eps the label smoothing."""
    # logsigmoid(x) = min(x, 0) - log1p(exp(-|x|)) neither overflows nor loses digits; log(sigmoid(x)) does both.
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def sigmoid(x: Tensor) -> Tensor:
    """The logistic sigmoid with an accurate gradient."""
    # torch.sigmoid rounds to 1 above x = 17 in float32, and its gradient s(1 - s) to 0. This gradient stays accurate.
    return F.logsigmoid(x).exp()
