"""What training changed: answers before and after, and the alignment tax."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.evaluation.answers import Answers as Answers
    from fastalign.evaluation.answers import answer as answer
    from fastalign.evaluation.answers import comparison as comparison
    from fastalign.evaluation.tax import measure_tax as measure_tax

lazy_exports(
    __name__,
    {
        "Answers": "fastalign.evaluation.answers",
        "answer": "fastalign.evaluation.answers",
        "comparison": "fastalign.evaluation.answers",
        "measure_tax": "fastalign.evaluation.tax",
    },
)
