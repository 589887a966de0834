"""What every network refuses when it is built."""

from __future__ import annotations

from hspsam_monai.errors import ConfigError


def check_arguments(num_classes: int, dropout: float = 0.0, in_channels: int = 3) -> None:
    """Refuse arguments that no network can be built with.

    Args:
        num_classes: K, background included.
        dropout: a probability below 1.
        in_channels: of the image.

    Raises:
        ConfigError: an argument is out of range.
    """
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; expected background and at least one class, so 2.")
    if in_channels != 3:
        raise ConfigError(f"in_channels is {in_channels}; SAM's encoders read 3 channels (repeat a grey image).")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"dropout is {dropout}; expected a probability in [0, 1).")
