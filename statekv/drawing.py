"""Whether pictures can be drawn here: matplotlib is an extra."""

from __future__ import annotations

from statekv.errors import ConfigError


def check_drawing() -> None:
    """Raise a ConfigError unless matplotlib is installed; before minutes of work, not after."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError("drawing needs matplotlib", "pip install 'statekv[plot]'") from None
