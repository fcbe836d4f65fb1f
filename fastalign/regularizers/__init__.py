"""Terms that hold a model near what it knew while it is trained; they can be added to any objective."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.regularizers.base import Step as Step
    from fastalign.regularizers.base import Term as Term
    from fastalign.regularizers.distillation import Distillation as Distillation
    from fastalign.regularizers.ewc import EWC as EWC
    from fastalign.regularizers.ewc import L2SP as L2SP
    from fastalign.regularizers.kl import KLToStart as KLToStart
    from fastalign.regularizers.layerwise import LayerWise as LayerWise
    from fastalign.regularizers.replay import Replay as Replay

lazy_exports(
    __name__,
    {
        "Distillation": "fastalign.regularizers.distillation",
        "EWC": "fastalign.regularizers.ewc",
        "KLToStart": "fastalign.regularizers.kl",
        "L2SP": "fastalign.regularizers.ewc",
        "LayerWise": "fastalign.regularizers.layerwise",
        "Replay": "fastalign.regularizers.replay",
        "Step": "fastalign.regularizers.base",
        "Term": "fastalign.regularizers.base",
    },
)
