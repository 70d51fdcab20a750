"""The comparison with diffusers; the trajectories of every setting are in tests/diffusion/process."""

from itertools import chain

import pytest

from benchmarks import diffusers_agreement
from diffusion.registry import SAMPLERS, SCHEDULES


def test_what_diffusers_has_agrees_to_its_precision():
    rows = list(
        chain(
            diffusers_agreement.schedules(),
            diffusers_agreement.conversions(),
            diffusers_agreement.embeddings(),
        )
    )
    assert len(rows) == 7 + 8 + 2
    for row in rows:
        assert row.as_installed < 1e-4, row
        assert row.exact is None or row.exact < 1e-12, row
    assert [row.as_installed for row in diffusers_agreement.spacings()] == [0.0, 0.0, 0.0]


def test_every_difference_on_purpose_is_there_and_can_be_switched_off():
    for choice in diffusers_agreement.choices():
        assert choice.by_default > 0.01, choice
        assert choice.with_option < 1e-4, choice


@pytest.mark.parametrize(("registry", "section"), [(SCHEDULES, "Noise schedules"), (SAMPLERS, "Samplers")])
def test_the_page_has_every_implementation_of_the_project(registry, section):
    page = diffusers_agreement.RESULTS.read_text()
    rows = page.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    for name in registry._own:
        assert any(row.startswith((f"| {name} |", f"| {name}, ")) for row in rows), name
