"""What a model can do, and what training changed: suites, answers before and after, and the alignment tax."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.evaluation.answers import Answers as Answers
    from fastalign.evaluation.answers import answer as answer
    from fastalign.evaluation.answers import comparison as comparison
    from fastalign.evaluation.run import evaluate as evaluate
    from fastalign.evaluation.suite import Item as Item
    from fastalign.evaluation.suite import Suite as Suite
    from fastalign.evaluation.suite import shipped_suites as shipped_suites
    from fastalign.evaluation.tax import measure_tax as measure_tax

lazy_exports(
    __name__,
    {
        "Answers": "fastalign.evaluation.answers",
        "Item": "fastalign.evaluation.suite",
        "Suite": "fastalign.evaluation.suite",
        "answer": "fastalign.evaluation.answers",
        "comparison": "fastalign.evaluation.answers",
        "evaluate": "fastalign.evaluation.run",
        "measure_tax": "fastalign.evaluation.tax",
        "shipped_suites": "fastalign.evaluation.suite",
    },
)
