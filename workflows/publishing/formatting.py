"""Numbers as people read them: with their standard errors, and durations."""

import math

MISSING = "not measured"


def with_error(value: float | None, error: float | None = None, missing: str = MISSING) -> str:
    """A value and its standard error, such as "0.0123 ± 0.0021".

    The error has two significant digits and the value as many decimals, which keeps them comparable. Without
    an error the value has four significant digits.

    Args:
        value: the value, or None.
        error: its standard error, or None if it is not known.
        missing: what to return if there is no value, or it is not a finite number.
    """
    if value is None or not math.isfinite(value):
        return missing
    if error is None or not math.isfinite(error) or error <= 0.0:
        return f"{value:.4g}"
    decimals = 1 - math.floor(math.log10(error))
    if decimals > 6 or decimals < 0:
        return f"{value:.4g} ± {error:.2g}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def duration(seconds: float) -> str:
    """A duration in the unit that suits it, such as "48 s", "3.2 min" or "1.5 h"."""
    if seconds < 60.0:
        return f"{seconds:.0f} s"
    if seconds < 3600.0:
        return f"{seconds / 60.0:.1f} min"
    return f"{seconds / 3600.0:.1f} h"
