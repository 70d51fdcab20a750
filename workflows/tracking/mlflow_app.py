"""MLflow's server, whose pages open in the mode for models that are trained.

A browser that has not been told otherwise opens MLflow's pages in the mode for language models, in which a
click on a trial leads to a page among evaluations of language models, whatever the experiment is. The mode is
kept in the browser alone. This server's first page sets it, unless the user has chosen one.

It is an app of MLflow: `mlflow server --app-name ray-ddpm`.
"""

from pathlib import Path

import mlflow.server
from fastapi.responses import HTMLResponse
from mlflow.server.fastapi_app import app

_SET_MODE = """<script>
if (localStorage.getItem("mlflow.workflowType_v1") === null)
  localStorage.setItem("mlflow.workflowType_v1", JSON.stringify("machine_learning"));
</script>"""

__all__ = ["app"]


def index() -> HTMLResponse:
    """MLflow's page, which is a program that reads the mode when it starts."""
    page = (Path(mlflow.server.app.static_folder) / "index.html").read_text()
    return HTMLResponse(
        page.replace("<head>", f"<head>{_SET_MODE}", 1), headers={"Cache-Control": "no-cache"}
    )


# Before MLflow's own routes, the last of which takes every address.
app.add_api_route("/", index, include_in_schema=False)
app.router.routes.insert(0, app.router.routes.pop())
