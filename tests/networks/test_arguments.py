"""Every network refuses the same impossible arguments, with the same words."""

import pytest

from hspsam_monai.errors import ConfigError
from hspsam_monai.networks import HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt
from hspsam_monai.networks.arguments import check_arguments


@pytest.mark.parametrize("network", [HSPSAM, SAMSP, ConvPyramidSAM, ProxyPrompt])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": float("nan")}, "dropout is nan"),
    ],
)
def test_arguments_out_of_range(network, options, message):
    with pytest.raises(ConfigError, match=message):
        network("mobile_sam", image_size=64, **options)


@pytest.mark.parametrize("network", [HSPSAM, SAMSP, ConvPyramidSAM])
def test_lora_of_no_rank_is_no_adaptation(network):
    with pytest.raises(ConfigError, match="adapt is 'lora' and lora_rank 0"):
        network("mobile_sam", image_size=64, adapt="lora", lora_rank=0)


def test_the_limits_themselves_are_accepted():
    check_arguments(2, 0.0, 3)
    check_arguments(256, 0.99)
    with pytest.raises(ConfigError, match="in_channels is 1"):
        check_arguments(2, in_channels=1)
