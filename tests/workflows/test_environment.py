"""What commands set in the environment of the processes that they start."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.workflows.conftest import user_environment

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("given", [None, "7"])
def test_processes_have_few_arenas_unless_the_user_wants_more(given):
    """A trial is a thread of its own; what one thread has freed, glibc does not give to the next."""
    code = (
        "import os; from workflows.environment import set_defaults; set_defaults(False); "
        "os.execvp('printenv', ['printenv', 'MALLOC_ARENA_MAX'])"
    )
    environment = user_environment() | {"PYTHONPATH": str(ROOT)}
    environment.pop("MALLOC_ARENA_MAX", None)
    if given is not None:
        environment["MALLOC_ARENA_MAX"] = given
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == (given or "2")
