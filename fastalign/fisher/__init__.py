"""The diagonal of the Fisher information of a model: how much each parameter matters to what the model knows."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.fisher.diagonal import fisher_diagonal as fisher_diagonal
    from fastalign.fisher.storage import Fisher as Fisher

lazy_exports(
    __name__,
    {
        "Fisher": "fastalign.fisher.storage",
        "fisher_diagonal": "fastalign.fisher.diagonal",
    },
)
