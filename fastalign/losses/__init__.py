"""Losses as pure functions of per-sequence log-probabilities.

`table.py` gives the losses their names and says what each one needs. The functions lie in six files:

- `preference.py`: losses of the margin between chosen and rejected;
- `pointwise.py`: losses that judge each completion of a pair by itself;
- `transport.py`: losses that compare the whole batch, sorted, instead of pairs (optimal transport);
- `divergence.py`: DPO with another divergence than the KL;
- `reference_free.py`: losses over pairs that need no reference;
- `unpaired.py`: losses over single completions with a label each.

`policy.py` has the losses of online training, which are per token and not in the table.

What the losses of the table have in common:

- Their tensors are (B,) and all float32 or all float64: the log-probability of each completion in nats, summed over its
  tokens, or averaged where the docstring says so. The result is (B,) in the same dtype.
- Values and gradients are finite and accurate at margins of +-1e4.
- They raise InputError for tensors that differ in shape, dtype or device, and for options out of range. They never look
  at the values of tensors, which would make a GPU wait.
"""

from typing import TYPE_CHECKING

from fastalign.losses.divergence import F_DIVERGENCES as F_DIVERGENCES
from fastalign.losses.divergence import FDivergence as FDivergence
from fastalign.losses.divergence import divergence_scores as divergence_scores
from fastalign.losses.mixture import pairwise_loss as pairwise_loss
from fastalign.losses.numerics import log1mexp as log1mexp
from fastalign.losses.preference import implicit_rewards as implicit_rewards
from fastalign.losses.table import ALIASES as ALIASES
from fastalign.losses.table import LENGTH_NORMALISED as LENGTH_NORMALISED
from fastalign.losses.table import PAIRWISE as PAIRWISE
from fastalign.losses.table import REFERENCE_FREE as REFERENCE_FREE
from fastalign.losses.table import UNPAIRED as UNPAIRED
from fastalign.losses.table import PairLoss as PairLoss
from fastalign.losses.table import canonical as canonical
from fastalign.losses.table import loss_function as loss_function
from fastalign.losses.table import options_of as options_of
from fastalign.losses.unpaired import apo_zero_unpaired as apo_zero_unpaired
from fastalign.losses.unpaired import bco as bco
from fastalign.losses.unpaired import kto as kto
from fastalign.losses.unpaired import kto_baseline as kto_baseline

# Type checkers resolve the stars below. ruff does not, and nothing in this file uses their names.
# ruff: noqa: F403
if TYPE_CHECKING:
    from fastalign.losses.divergence import *
    from fastalign.losses.pointwise import *
    from fastalign.losses.preference import *
    from fastalign.losses.reference_free import *
    from fastalign.losses.transport import *
else:
    # The function of every row is a name of this package too: `from fastalign.losses import dpo`.
    globals().update({row.function.__name__: row.function for row in PAIRWISE.values()})
