import pytest


@pytest.fixture(autouse=True, scope="module")
def _small_reference(small_reference):
    pass
