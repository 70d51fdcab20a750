"""A contender for tests: counts its measurements."""

from benchmarks.contender import Measure


def count(step: float) -> Measure:
    total = 0.0

    def measure() -> dict[str, float]:
        nonlocal total
        total += step
        print("what a contender prints is no figure")
        return {"count": total}

    return measure
