"""MLflow's server with another first page, which test_mlflow_server opens in a browser."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]


@pytest.mark.filterwarnings("ignore:starlette.middleware.wsgi is deprecated")  # MLflow's own import
def test_the_mode_is_set_before_mlflows_program_starts():
    module, name = PROJECT["entry-points"]["mlflow.app"]["ray-ddpm"].split(":")
    app = getattr(import_module(module), name)
    first = app.router.routes[0]
    assert first.path == "/" and first.methods == {"GET"}
    page = first.endpoint().body.decode()
    scripts = re.findall(r"<script.*?</script>", page, re.DOTALL)
    assert len(scripts) >= 2 and "machine_learning" in scripts[0] and "src=" not in scripts[0]
    assert "=== null" in scripts[0], "what the user has chosen stays"
