"""What counts as growth."""

import pytest

from benchmarks import endurance
from benchmarks.endurance import Growth

FLAT = [100.0, 180.0, 200.0, 201.0, 199.0, 200.0, 202.0, 200.0]


@pytest.mark.parametrize(
    ("memory", "grown"),
    [
        (FLAT, False),
        ([each + 3.0 * place for place, each in enumerate(FLAT)], True),
        ([each + 0.5 * place for place, each in enumerate(FLAT)], False),
    ],
)
def test_memory_that_rises_after_the_start_is_growth(memory, grown):
    assert bool(Growth("work", memory, [20] * 8).grown()) == grown


def test_descriptors_that_are_not_closed_are_growth():
    (line,) = Growth("work", FLAT, list(range(20, 36, 2))).grown()
    assert line == "work: open files"
    assert Growth("work", FLAT).grown() == [] and len(Growth("work", FLAT).rows()) == 1


def test_sampling_draws_by_both_threads_and_counts_what_it_uses(fuzz_files):
    growth = endurance.sampling(fuzz_files[0], 0.02)
    assert growth.memory and growth.descriptors and " 0 requests" not in growth.work


def test_a_request_that_fails_ends_the_sampling_of_both_threads(fuzz_files, monkeypatch):
    """One thread fails, and the other would go on to the end."""

    def draw(sampler, rng):
        if rng.random() < 0.01:
            raise ZeroDivisionError

    monkeypatch.setattr(endurance, "draw_something", draw)
    with pytest.raises(ZeroDivisionError):
        endurance.sampling(fuzz_files[0], 60.0)


def test_bad_names_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        endurance.main(["nothing"])
    assert "give any of sampling, sweep" in capsys.readouterr().err
