"""The notebook of examples/: valid, executed, and written for the API as it is."""

import json

import pytest

from docs.blocks import ROOT
from tests.docs.test_commands import check_program

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return json.loads(request.param.read_text())


def test_there_is_a_notebook():
    assert NOTEBOOKS


def test_it_is_valid(notebook):
    """As its format's own validator says, where `make docs` has installed that."""
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.from_dict(notebook))


def test_it_was_executed_from_top_to_bottom_without_an_error(notebook):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3


def test_it_uses_names_and_settings_that_exist(notebook):
    program = "\n".join("".join(cell["source"]) for cell in code_cells(notebook))
    assert "run_sweep(" in program
    check_program(program)


def test_it_is_small_and_names_no_path_of_the_machine_that_executed_it(notebook):
    text = json.dumps(notebook)
    assert len(text) < 700_000
    assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text
