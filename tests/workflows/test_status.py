"""Exit statuses of runs."""

import pytest

from workflows.status import Outcome


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome("finished"), 0),  # a dry run
        (Outcome("finished", "runs/one", has_model=True), 0),
        (Outcome("failed", "runs/one", reason="it diverged"), 1),
        (Outcome("stopped", "runs/one"), 3),
        (Outcome("stopped", "runs/one", has_model=True), 3),  # trials are missing
    ],
)
def test_each_way_of_ending_has_its_status(outcome, status):
    assert outcome.exit_status == status
