"""Shared by every test: one thread, since the tensors are small and other work may hold the second core."""

import torch

torch.set_num_threads(1)
