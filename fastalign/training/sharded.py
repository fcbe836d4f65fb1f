"""Training with FSDP2, which shards weights, gradients and optimiser over the processes (arXiv:2304.11277).

accelerate wraps the model (`fully_shard`). What is here lets the rest of a run work with shards: a reference that is
scored at every step is sharded too, and everything that is saved is gathered and written by process 0, as safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer

from fastalign.errors import ConfigError
from fastalign.models.adapters import has_adapter
from fastalign.models.sharding import gathered, is_sharded, own_part

_COMPLETE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class ShardedTraining(Trainer):
    """The part of `AlignmentTrainer` that trains a model whose weights FSDP2 shards."""

    model: nn.Module  # this type and the next are wider in transformers.Trainer
    optimizer: AcceleratedOptimizer  # once training has begun
    reference: Any
    objective: Any

    def create_accelerator_and_postprocess(self) -> None:
        """`transformers.Trainer.create_accelerator_and_postprocess`, with FSDP on CPUs too.

        accelerate has FSDP for accelerators alone, and leaves it out on CPUs without a word.

        Raises:
            ConfigError: FSDP of another version than 2.
        """
        super().create_accelerator_and_postprocess()
        state: Any = self.accelerator.state
        if self.args.fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            options: dict[str, Any] = self.args.fsdp_plugin_args or {}
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**options)
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise ConfigError("FSDP of version 1 is not supported: set version=2 in fsdp_config, or fsdp_version: 2")

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.is_fsdp_enabled and self.reference is not None and self.reference.weights is not None:
            self.reference.weights.shard(self.model)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """`transformers.Trainer.save_model`, with the shards gathered."""
        if not (self.is_fsdp_enabled and is_sharded(self.model)):
            super().save_model(output_dir, _internal_call)
            return
        state, known = {}, {}
        for name, value in self.model.state_dict().items():
            whole = gathered(value)  # one after another, so that only process 0 holds all of them
            if self.args.should_save:
                # A tied weight stays one tensor, by which transformers knows that it is tied.
                part = own_part(value)
                state[name] = known.setdefault(part.data_ptr() if part.numel() else name, whole.cpu())
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state, to save: the complete one by the names of the parameters, where it is sharded."""
        if not self.is_fsdp_enabled:
            return self.optimizer.state_dict()
        return get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_COMPLETE)

    def set_optimizer_state(self, state: dict[str, Any]) -> None:
        """Sets what `optimizer_state` returned."""
        if self.is_fsdp_enabled:
            set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=_COMPLETE)
        else:
            self.optimizer.load_state_dict(state)

    def load_before_sharding(self, checkpoint: Path) -> None:
        """Reads a checkpoint's weights into the model while every process has all of them.

        Raises:
            ConfigError: The model is sharded already.
        """
        if is_sharded(self.model):
            raise ConfigError(
                f"{checkpoint} cannot be read into a model that FSDP has sharded already: start the processes anew, "
                "with resume_from_checkpoint=last"
            )
        self.is_fsdp_enabled = False  # else transformers would read the pickles of torch.distributed.checkpoint
        try:
            super()._load_from_checkpoint(str(checkpoint), self.model)
        finally:
            self.is_fsdp_enabled = True

    def begin_sharded(self, regularizers: Sequence[Any]) -> None:
        """Moves a model that FSDP will shard to its device: the Trainer leaves that to FSDP, which is after scoring.

        Raises:
            ConfigError: An adapter, a regulariser or a loss that compares rows, which cannot be combined with FSDP.
        """
        if not self.is_fsdp_enabled:
            return
        if getattr(self.objective, "compares_rows", False):
            raise ConfigError(
                "fsdp is on, and the loss (aot, kto or bco) compares rows of a micro-batch, which is not supported: "
                "leave fsdp out, or use another loss"
            )
        if has_adapter(self.model):
            raise ConfigError(
                "fsdp is on, and an adapter is trained, which is not supported: leave fsdp out (DDP suits an adapter), "
                "or train all weights"
            )
        for regularizer in regularizers:
            raise ConfigError(
                f"{type(regularizer).__name__} cannot be combined with FSDP, because it reads weights that lie in "
                "parts on the processes, or runs the model on some of them alone: use DDP, or leave it out"
            )
        self.model.to(self.args.device)
