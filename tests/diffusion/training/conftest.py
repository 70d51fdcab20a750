import pytest


@pytest.fixture(autouse=True)
def _small_reference(small_reference):
    pass
