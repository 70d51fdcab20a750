"""Files that several modules read."""

import pytest

from benchmarks.fuzz import own_files


@pytest.fixture(scope="session")
def fuzz_files(tmp_path_factory):
    """Paths of the files that benchmarks.fuzz damages."""
    return own_files(tmp_path_factory.mktemp("fuzz"))
