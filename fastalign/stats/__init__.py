"""Tests, intervals and measures that say what numbers of models are worth. They need numpy and scipy, not torch."""

from typing import TYPE_CHECKING

from fastalign.lazy import lazy_exports

if TYPE_CHECKING:
    from fastalign.stats.agreement import DawidSkene as DawidSkene
    from fastalign.stats.agreement import dawid_skene as dawid_skene
    from fastalign.stats.agreement import krippendorff_alpha as krippendorff_alpha
    from fastalign.stats.calibration import Isotonic as Isotonic
    from fastalign.stats.calibration import RiskCoverage as RiskCoverage
    from fastalign.stats.calibration import brier_score as brier_score
    from fastalign.stats.calibration import expected_calibration_error as expected_calibration_error
    from fastalign.stats.calibration import isotonic as isotonic
    from fastalign.stats.calibration import risk_coverage as risk_coverage
    from fastalign.stats.diversity import distinct_n as distinct_n
    from fastalign.stats.diversity import self_bleu as self_bleu
    from fastalign.stats.diversity import template_share as template_share
    from fastalign.stats.diversity import vendi_score as vendi_score
    from fastalign.stats.paired import Interval as Interval
    from fastalign.stats.paired import items_needed as items_needed
    from fastalign.stats.paired import mcnemar as mcnemar
    from fastalign.stats.paired import mcnemar_power as mcnemar_power
    from fastalign.stats.paired import newcombe as newcombe
    from fastalign.stats.paired import paired_bootstrap as paired_bootstrap
    from fastalign.stats.paired import wilson as wilson
    from fastalign.stats.sequential import confidence_sequence as confidence_sequence
    from fastalign.stats.sequential import e_benjamini_hochberg as e_benjamini_hochberg
    from fastalign.stats.sequential import e_process as e_process
    from fastalign.stats.two_sample import TwoSample as TwoSample
    from fastalign.stats.two_sample import domain_auc as domain_auc
    from fastalign.stats.two_sample import energy_distance as energy_distance
    from fastalign.stats.two_sample import maximum_mean_discrepancy as maximum_mean_discrepancy
    from fastalign.stats.two_sample import two_sample_test as two_sample_test

lazy_exports(
    __name__,
    {
        "DawidSkene": "fastalign.stats.agreement",
        "Interval": "fastalign.stats.paired",
        "Isotonic": "fastalign.stats.calibration",
        "RiskCoverage": "fastalign.stats.calibration",
        "TwoSample": "fastalign.stats.two_sample",
        "brier_score": "fastalign.stats.calibration",
        "confidence_sequence": "fastalign.stats.sequential",
        "dawid_skene": "fastalign.stats.agreement",
        "distinct_n": "fastalign.stats.diversity",
        "domain_auc": "fastalign.stats.two_sample",
        "e_benjamini_hochberg": "fastalign.stats.sequential",
        "e_process": "fastalign.stats.sequential",
        "energy_distance": "fastalign.stats.two_sample",
        "expected_calibration_error": "fastalign.stats.calibration",
        "isotonic": "fastalign.stats.calibration",
        "items_needed": "fastalign.stats.paired",
        "krippendorff_alpha": "fastalign.stats.agreement",
        "maximum_mean_discrepancy": "fastalign.stats.two_sample",
        "mcnemar": "fastalign.stats.paired",
        "mcnemar_power": "fastalign.stats.paired",
        "newcombe": "fastalign.stats.paired",
        "paired_bootstrap": "fastalign.stats.paired",
        "risk_coverage": "fastalign.stats.calibration",
        "self_bleu": "fastalign.stats.diversity",
        "template_share": "fastalign.stats.diversity",
        "two_sample_test": "fastalign.stats.two_sample",
        "vendi_score": "fastalign.stats.diversity",
        "wilson": "fastalign.stats.paired",
    },
)
