"""The options of quantisation."""

import pytest

from fastalign.config.quantization import QUANTIZATIONS, check_quantization
from fastalign.errors import ConfigError


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_scales_are_quantised_in_four_bits_only(quantization):
    check_quantization(quantization, False)
    if quantization in ("nf4", "fp4"):
        check_quantization(quantization, True)
    else:
        with pytest.raises(ConfigError, match=f"nf4 or fp4, not '{quantization}'"):
            check_quantization(quantization, True)


def test_an_unknown_name_is_refused():
    with pytest.raises(ConfigError, match="quantization is 'nf5'; did you mean 'nf4'"):
        check_quantization("nf5", False)
