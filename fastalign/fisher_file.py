"""Fisher information in memory and on disk: tensors by parameter name, as safetensors, in 32 or 8 bits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastalign.errors import ConfigError, DataError, ModelError

# 8 bits: code 0 is 0, codes 1 to 255 are 2^((code - 255) * STEP) times the largest value of the block.
BLOCK = 256
STEP = 24 / 254
_LARGEST = ":largest"


class Fisher(dict):
    """The diagonal of the Fisher information, a tensor by parameter name.

    samples: how many squared gradients it is the mean of. estimator, per: as `fisher_diagonal` was asked.
    """

    def __init__(
        self, values: Mapping[str, Tensor] = (), *, samples: int = 0, estimator: str = "empirical", per="sequence"
    ):
        super().__init__(values)
        self.samples, self.estimator, self.per = samples, estimator, per

    def merged(self, newer: Mapping[str, Tensor], decay: float = 1.0) -> Fisher:
        """`decay * F + F_new`, for online EWC (Schwarz et al. 2018, arXiv:1805.06370); a new Fisher.

        ConfigError for a decay outside [0, 1], ModelError where names or shapes differ.
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
        """Writes a safetensors file, atomically. With 8 bits it is a quarter of the size, and a value is off by at most
        3.4 % of itself, or by 6e-8 of the largest of its block of 256 where it is smaller than that.
        """
        if bits not in (8, 32):
            raise ConfigError(f"bits is {bits}; Fisher information is kept in 32 or 8")
        tensors: dict[str, Tensor] = {}
        for name, values in self.items():
            if bits == 32:
                tensors[name] = values.detach().cpu().contiguous()
            else:
                tensors[name], tensors[name + _LARGEST] = _to_codes(values.detach().cpu())
        about = {"samples": self.samples, "estimator": self.estimator, "per": self.per, "bits": bits}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            save_file(tensors, temporary, metadata={"fisher": json.dumps(about)})
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Fisher:
        """Reads what `save` wrote, or any safetensors file of tensors by parameter name; DataError where it is none."""
        if not Path(path).is_file():
            raise DataError(f"{path} is not a file: give the safetensors file of Fisher information.")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
                about = json.loads((file.metadata() or {}).get("fisher", "{}"))
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(f"{path} is not a readable safetensors file ({error}): compute it again.") from error
        if about.pop("bits", 32) == 8:
            names = [name for name in tensors if not name.endswith(_LARGEST)]
            tensors = {name: _from_codes(tensors[name], tensors[name + _LARGEST]) for name in names}
        return cls(tensors, **about)


def _to_codes(values: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes of values' shape, and the largest value of each block (n / BLOCK,) float32."""
    flat = torch.nn.functional.pad(values.float().flatten(), (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    largest = flat.amax(1) if flat.numel() else flat.new_zeros(0)
    codes = (255 + torch.log2(flat / largest.unsqueeze(1)) / STEP).round()
    codes = torch.nan_to_num(codes, nan=0.0, neginf=0.0).clamp_(0, 255).to(torch.uint8)
    return codes.flatten()[: values.numel()].view(values.shape), largest


def _from_codes(codes: Tensor, largest: Tensor) -> Tensor:
    table = torch.exp2((torch.arange(256, dtype=torch.float32) - 255) * STEP)
    table[0] = 0.0
    flat = torch.nn.functional.pad(table[codes.flatten().int()], (0, -codes.numel() % BLOCK)).view(-1, BLOCK)
    return (flat * largest.unsqueeze(1)).flatten()[: codes.numel()].view(codes.shape)
