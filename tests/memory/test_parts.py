import pytest

from fastalign.memory.parts import Setting, head_bytes, layer_bytes, parts, trained_parameters, weight_bytes
from fastalign.memory.shapes import read_shapes

SHAPES = read_shapes("smollm2-135m-instruct")[0]
FULL = {"rank": 0, "size": 4}
LORA = {"rank": 16, "size": 2}
QLORA = {**LORA, "quantization": "nf4", "double": True}


# (options, tokens, checkpointing, MB)
MEASURED = [
    (FULL, 512, False, 2314),
    (FULL, 512, True, 2287),
    (FULL, 1024, False, 2884),
    (LORA, 512, False, 629),
    (LORA, 1024, False, 881),
    (LORA, 1024, True, 412),
    (QLORA, 512, False, 474),
    (QLORA, 1024, False, 731),
    (QLORA, 1024, True, 260),
]


@pytest.mark.parametrize(("options", "tokens", "checkpointing", "measured"), MEASURED)
def test_prediction_is_within_a_tenth_of_what_was_measured(options, tokens, checkpointing, measured):
    """Peaks less libraries of SmolLM2-135M, half of the tokens scored; docs/how-to/what-fits.md says how."""
    setting = Setting(tokens, tokens // 2, checkpointing=checkpointing, bounded=True, **options)
    found = parts(SHAPES, setting)
    assert abs((sum(found.values()) - found["libraries"]) / 1e6 / measured - 1) < 0.1


def test_quantised_weights_count_their_scales():
    plain = weight_bytes(SHAPES, Setting(1))
    linear = SHAPES.linear_parameters
    assert plain == 2 * SHAPES.parameters
    assert plain - weight_bytes(SHAPES, Setting(1, quantization="nf4")) == 2 * linear - linear // 2 - linear // 16
    assert plain - weight_bytes(SHAPES, Setting(1, quantization="int8")) > 0.99 * linear


def test_a_bound_on_freed_memory_is_part_of_the_plan():
    held = parts(SHAPES, Setting(512, **FULL))
    assert held["allocator"] > 0
    assert parts(SHAPES, Setting(512, bounded=True, **FULL))["allocator"] == 0
    assert parts(SHAPES, Setting(512, device="cuda", **FULL))["allocator"] == 0


def test_accumulation_and_a_reference_cost_the_trained_weights():
    one = sum(parts(SHAPES, Setting(2048, **FULL)).values())
    assert sum(parts(SHAPES, Setting(2048, reference=True, **FULL)).values()) == one + 4 * SHAPES.parameters
    assert sum(parts(SHAPES, Setting(2048, accumulates=True, **FULL)).values()) > one


def test_adapters_on_some_layers_need_less():
    every, two = Setting(512, **LORA), Setting(512, targets=("q_proj", "v_proj"), **LORA)
    assert trained_parameters(SHAPES, two) == 30 * 16 * ((576 + 576) + (576 + 192))
    # The inputs of gate and up, and of down, are not kept, nor are five products with the adapters' first factor.
    assert layer_bytes(SHAPES, every) - layer_bytes(SHAPES, two) == 512 * 2 * (576 + 1536 + 5 * 16)
    head = Setting(512, targets=("q_proj", "lm_head"), **LORA)
    assert trained_parameters(SHAPES, head) == 16 * (30 * (576 + 576) + 576 + 49152)
    assert head_bytes(SHAPES, head) - head_bytes(SHAPES, every) == 5 << 20


def test_a_quantised_output_layer_is_no_longer_in_the_other_weights():
    untied = SHAPES._replace(tied=False)
    for kind, size in (("nf4", 1 / 2 + 4 / 64), ("int8", 1 + 4 / 576)):
        plain, packed = (weight_bytes(untied, Setting(1, quantization=kind, quantize_head=q)) for q in (False, True))
        assert plain - packed == 49152 * 576 * (2 - size)
