# %% [markdown]
# # Log-probabilities without logits, and their gradient in one pass
#
# A language model's output layer turns a hidden state $h$ into logits $z = W h$, one per vocabulary entry. Training
# needs only one number per token, $\log p_y = z_y - \log \sum_j e^{z_j}$. This notebook shows that neither that number
# nor its gradient needs the $[tokens, vocabulary]$ logits in memory.
#
# The file is a notebook in percent format: open it in Jupyter (jupytext), VS Code or PyCharm, or run it with Python.

# %%
import torch

from fastalign import linear_logprobs

torch.manual_seed(0)
tokens, width, vocabulary = 512, 64, 20_000
hidden = torch.randn(tokens, width)
weight = torch.randn(vocabulary, width) / width**0.5
targets = torch.randint(0, vocabulary, (tokens,))  # targets[i] is the token that hidden[i] predicts

# %% [markdown]
# ## The plain way
# It holds the logits, their softmax and their gradient: three tensors of this size.

# %%
logits = hidden @ weight.T
plain = logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
print(f"one such tensor: {logits.numel() * 4 / 2**20:.0f} MiB for {tokens} tokens")

# %% [markdown]
# ## The same numbers from tiles
# `linear_logprobs` walks over the vocabulary tile by tile and keeps a running maximum and a running sum per token.

# %%
ours = linear_logprobs(hidden, weight, targets)
print(f"largest difference: {(ours - plain).abs().max():.1e} nats")

# %% [markdown]
# ## The gradient does not depend on the loss
# $\partial \log p_y / \partial h = W_y - \sum_j p_j W_j$. The sum is an average of the rows of $W$, weighted by the
# softmax: attention with query $h$ and keys = values = $W$. Flash attention accumulates such a sum in the same pass
# that computes the normaliser, and so does fastalign. With a frozen output layer (LoRA, for example) the backward pass
# only multiplies the stored vectors by the loss's coefficients.

# %%
leaf = hidden.clone().requires_grad_()
linear_logprobs(leaf, weight, targets).sum().backward()
by_formula = weight[targets] - logits.softmax(-1) @ weight
print(f"largest difference from the formula: {(leaf.grad - by_formula).abs().max():.1e}")

# %% [markdown]
# ## Any loss on top
# A loss is a function of the log-probabilities. Here is DPO for one pair, by hand; `fused_linear_dpo` is the same.

# %%
chosen, rejected = targets[:256], targets[256:]
policy = linear_logprobs(leaf, weight, torch.cat([chosen, rejected])).view(2, -1).sum(1)
reference = plain.view(2, -1).sum(1)
beta = 0.1
margin = beta * ((policy[0] - reference[0]) - (policy[1] - reference[1]))
loss = -torch.nn.functional.logsigmoid(margin)
print(f"loss {loss.item():.4f}; log 2 is {torch.tensor(2.0).log().item():.4f}, since policy and reference are equal")
