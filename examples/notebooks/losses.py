# %% [markdown]
# # The losses of preference optimisation, side by side
#
# Every loss over pairs is a function of four numbers: the log-probability sums of the chosen and the rejected answer
# under the policy and under the reference. This notebook evaluates them on a grid of margins, so that you see what
# each of them rewards.

# %%
import torch

from fastalign.losses import PAIRWISE, pairwise_loss

margins = torch.tensor([-40.0, -10.0, 0.0, 10.0, 40.0])  # (policy - reference) of chosen minus that of rejected, nats
reference = torch.full_like(margins, -60.0)
chosen, rejected = reference + margins / 2, reference - margins / 2
lengths = torch.full_like(margins, 30.0)  # tokens of each answer: some losses take averages per token

# %%
print("loss".ljust(16) + "".join(f"{m:>9.0f}" for m in margins.tolist()) + "   (margin in nats)")
for name in PAIRWISE:
    if name in ("exo", "robust", "aot", "aot_unpaired"):
        continue  # exo needs label smoothing; robust is DPO without it; aot sorts over the batch
    values = pairwise_loss(
        name, None, chosen, rejected, reference, reference, lengths_chosen=lengths, lengths_rejected=lengths
    )
    print(name.ljust(16) + "".join(f"{value:>9.3f}" for value in values.tolist()))

# %% [markdown]
# ## Where the gradient goes
# DPO's gradient in the margin is $-\beta\,\sigma(-\beta m)$: pairs that are already right hardly count. IPO's is linear
# in the distance from its target, so it also pulls back what went too far.

# %%
for name in ("dpo", "ipo", "hinge"):
    c = chosen.clone().requires_grad_()
    pairwise_loss(
        name, None, c, rejected, reference, reference, lengths_chosen=lengths, lengths_rejected=lengths
    ).sum().backward()
    print(name.ljust(16) + "".join(f"{value:>9.4f}" for value in c.grad.tolist()))

# %% [markdown]
# ## Mixtures
# Several losses with weights, as in MPO: `loss_type=["dpo", "bco_pair"], loss_weights=[0.8, 0.2]` in a trainer.

# %%
mixed = pairwise_loss(["dpo", "bco_pair"], [0.8, 0.2], chosen, rejected, reference, reference)
print("mixture".ljust(16) + "".join(f"{value:>9.3f}" for value in mixed.tolist()))
