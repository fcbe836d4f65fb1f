import pytest

from fastalign.errors import ConfigError
from fastalign.memory import planning
from fastalign.memory.parts import Setting
from fastalign.memory.shapes import read_shapes

SHAPES = read_shapes("smollm2-135m-instruct")[0]


@pytest.mark.parametrize(("text", "size"), [("16GB", 16 * 10**9), ("1.5 GiB", 3 * 2**29), ("500mb", 5 * 10**8)])
def test_sizes(text, size):
    assert planning.parse_size("--memory", text) == size


@pytest.mark.parametrize("text", ["16", "0GB", "-1GB", "many", "", 16, None])
def test_other_sizes_are_refused(text):
    with pytest.raises(ConfigError, match="give a number above 0 with a unit"):
        planning.parse_size("--memory", text)


def test_the_choice_is_the_fastest_that_fits():
    setting = Setting(8192)
    choices = planning.alternatives(SHAPES, setting, rows=8)
    for limit in (10**9, 3 * 10**9, 10**10):
        chosen = planning.choose(choices, limit)
        assert chosen is not None
        assert chosen.peak <= limit
        assert all(other.cost >= chosen.cost for other in choices if other.peak <= limit)
    assert planning.choose(choices, 10**8) is None


def test_the_longest_micro_batch_fits_and_one_token_more_does_not():
    setting = Setting(1, rank=16)
    tokens = planning.longest(SHAPES, setting, 4 * 10**9)
    assert planning.peak(SHAPES, setting._replace(tokens=tokens)) <= 4 * 10**9
    assert planning.peak(SHAPES, setting._replace(tokens=tokens + 1)) > 4 * 10**9
    assert planning.longest(SHAPES, setting, 10**6) == 0
