"""Numbers that an option cannot have are refused where the options are made, not after the model is loaded."""

from __future__ import annotations

import math

import pytest

from fastalign.cli.run_options import RunOptions
from fastalign.config import ranges
from fastalign.config.base import AlignmentConfig
from fastalign.config.distillation import DistillationConfig
from fastalign.config.preference import PreferenceConfig
from fastalign.errors import ConfigError
from fastalign.options import from_mapping
from fastalign.regularizers import EWC, L2SP, Distillation, KLToStart, LayerWise, Replay

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ranges.TRAINING)
@pytest.mark.parametrize("value", [NAN, INF, -INF, -1, "x", True])
def test_no_option_of_training_is_nan_infinite_or_negative(name, value):
    with pytest.raises(ConfigError, match=f"^{name} is "):
        AlignmentConfig(**{name: value})


CASES = {
    PreferenceConfig: {
        "nll_weight": (NAN, INF, -1), "beta": (NAN, INF, 0), "memory_budget": (-1,), "loss_weights": ([NAN], [-1], [0]),
        "desirable_weight": (2.0, NAN), "undesirable_weight": (0.5,), "ref_model_mixup_alpha": (NAN, 0.5),
        "ref_model_sync_steps": (-1, 8),
    },
    DistillationConfig: {
        "weight": (NAN, -1, 1), "temperature": (NAN, 0, -1, INF), "divergence": ("x",), "jsd_beta": (NAN, 0, 1),
        "top_k": (0, -1), "sample_temperature": (0, NAN), "sample_tokens": (0,),
    },
    RunOptions: {"lora_dropout": (NAN, 2, -1, 1), "lora_alpha": (0,), "lora_rank": (-1,), "max_new_tokens": (0,)},
    L2SP: {"strength": (NAN, INF, -1, 0, "x")},
    EWC: {"strength": (NAN, INF, -1, 0), "decay": (NAN, 0, 2)},
    KLToStart: {"strength": (NAN, -1), "divergence": ("x",), "jsd_beta": (NAN, 0, 1)},
    LayerWise: {"decay": (NAN, -1, INF, 0.0)},
    Replay: {"share": (NAN, INF, -1, 0, 1, "", "x", {}), "weight": (NAN, -1, INF), "max_length": (0,)},
    Distillation: {"weight": (NAN, -1, 1), "jsd_beta": (NAN, 1), "temperature": (0, NAN), "top_k": (0,)},
}  # fmt: skip
NEEDED = {
    RunOptions: {"model": "m", "train": "t.jsonl"}, EWC: {"fisher": {}, "strength": 1.0}, L2SP: {"strength": 1.0},
    KLToStart: {"strength": 1.0}, Replay: {"text": [{"text": "a"}]}, Distillation: {"teacher": "start"},
}  # fmt: skip
ONE_EACH = [
    (cls, name, value) for cls, options in CASES.items() for name, values in options.items() for value in values
]


@pytest.mark.parametrize(("cls", "name", "value"), ONE_EACH, ids=lambda x: getattr(x, "__name__", repr(x)))
def test_a_bad_number_is_refused_at_construction(cls, name, value):
    with pytest.raises(ConfigError, match=name) as error:
        cls(**{**NEEDED.get(cls, {}), name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options", [{"logging_steps": INF}, {"save_steps": INF}, {"ddp_timeout": 10**30}, {"accelerator_config": "x.json"}]
)
def test_what_transformers_stumbles_over_is_a_sentence(options):
    with pytest.raises(ConfigError):
        from_mapping(AlignmentConfig, options)


def test_what_is_inside_passes():
    PreferenceConfig(loss_type="kto", desirable_weight=2.0, learning_rate=0.0, max_grad_norm=0.0, warmup_steps=0.1)
    PreferenceConfig(sync_ref_model=True, precompute_ref_log_probs=False, ref_model_mixup_alpha=1.0)
    assert str(ranges.Range(0, 1, above=True)) == "finite and above 0 and at most 1"
