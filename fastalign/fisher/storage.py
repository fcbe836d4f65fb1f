"""Fisher information in memory and in safetensors files: tensors by parameter name, in 32 or 8 bits per entry."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastalign.errors import ConfigError, DataError, ModelError
from fastalign.files import atomic_write
from fastalign.fisher.eight_bit import ByteSums

# What is squared, and for what: `fisher_diagonal` explains them.
Estimator = Literal["empirical", "sampled", "batch"]
Per = Literal["sequence", "token"]
_SCALE = ":scale"  # ends the name of the scales of a matrix in 8 bits; the matrix itself has the parameter's name


class Fisher(MutableMapping):
    """The diagonal of the Fisher information: a mapping from parameter names to tensors of the parameters' shapes.

    Matrices that were added up, or read from a file, in 8 bits stay so in the attribute `stored`. `fisher[name]` is
    always a tensor of values.

    Args:
        values: tensors by parameter name.
        samples: how many squared gradients they are the mean of.
        estimator: as in `fisher_diagonal`.
        per: as in `fisher_diagonal`.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor] | None = None,
        *,
        samples: int = 0,
        estimator: Estimator = "empirical",
        per: Per = "sequence",
    ):
        self.stored: dict[str, Any] = dict(values or {})  # each a Tensor or ByteSums
        self.samples, self.estimator, self.per = samples, estimator, per

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        return stored if isinstance(stored, Tensor) else stored.values()

    def __setitem__(self, name: str, values: Tensor) -> None:
        self.stored[name] = values

    def __delitem__(self, name: str) -> None:
        del self.stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def merged(self, newer: Mapping[str, Tensor], decay: float = 1.0) -> Fisher:
        """A new Fisher of `decay * F + F_new`, for online EWC (Schwarz et al. 2018, arXiv:1805.06370).

        Args:
            newer: F_new, by the same parameter names.
            decay: from 0 (forget the old) to 1 (forget nothing).

        Raises:
            ConfigError: `decay` is outside [0, 1].
            ModelError: names or shapes differ.
        """
        if not 0 <= decay <= 1:
            raise ConfigError(f"decay is {decay}; it must be between 0 (forget the old) and 1 (forget nothing)")
        if other := sorted(self.keys() ^ newer.keys()):
            raise ModelError(
                f"{len(other)} parameters ({other[0]}, ...) are in one Fisher information and not in the other: "
                "compute both for the same model."
            )
        for name, values in self.items():
            if values.shape != newer[name].shape:
                raise ModelError(
                    f"{name} is {tuple(values.shape)} in one Fisher information and {tuple(newer[name].shape)} in the "
                    "other: compute both for the same model."
                )
        out = {name: torch.add(newer[name], values, alpha=decay) for name, values in self.items()}
        samples = self.samples + getattr(newer, "samples", 0)
        return Fisher(out, samples=samples, estimator=self.estimator, per=self.per)

    def save(self, path: str | Path, *, bits: int = 32) -> None:
        """Writes a safetensors file, atomically.

        Args:
            path: of the file; missing folders are made.
            bits: 32 or 8. With 8 the file has a quarter of the size. Values of matrices are then off by at most 3.4 %
                of themselves, or by 6e-8 of the largest of their row where they are smaller than that. Matrices that
                are in 8 bits already are written unchanged.

        Raises:
            ConfigError: `bits` is another number.
        """
        if bits not in (8, 32):
            raise ConfigError(f"bits is {bits}; Fisher information is stored in 32 or 8")
        tensors: dict[str, Tensor] = {}
        for name, stored in self.stored.items():
            if bits == 32 or (isinstance(stored, Tensor) and stored.dim() != 2):
                tensors[name] = self[name].detach().cpu().contiguous()
                continue
            eight = ByteSums.nearest(stored.detach().float()) if isinstance(stored, Tensor) else stored
            tensors[name], tensors[name + _SCALE] = eight.codes.cpu().contiguous(), eight.scale.cpu().contiguous()
        about = {"samples": self.samples, "estimator": self.estimator, "per": self.per, "bits": bits}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"fisher": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """Reads a file that `save` wrote, or any safetensors file of tensors by parameter name.

        Args:
            path: of the file.

        Raises:
            DataError: there is no such file, or it is not a safetensors file.
        """
        if not Path(path).is_file():
            raise DataError(f"{path} is not a file: give the safetensors file of Fisher information.")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                about = json.loads((file.metadata() or {}).get("fisher", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable safetensors file ({error}): compute it again.") from error
        if about.pop("bits", 32) == 8:
            scales = {name.removesuffix(_SCALE): tensors.pop(name) for name in list(tensors) if name.endswith(_SCALE)}
            tensors |= {name: ByteSums(tensors[name], scale) for name, scale in scales.items()}
        return cls(tensors, **about)
