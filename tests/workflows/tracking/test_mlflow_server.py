"""A sweep with a real MLflow server that is killed and restarted, and its pages in a real browser."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest
from mlflow import MlflowClient
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[3]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

COLUMN_NUMBERS = "headers => headers.map(header => Number(header.getAttribute('aria-colindex')))"
# A row of the table is in two parts, with its name and with its columns.
TEXTS_OF_ROWS = """() => {
  const texts = {};
  for (const row of document.querySelectorAll("[role=row][row-index]")) {
    const index = row.getAttribute("row-index");
    texts[index] = (texts[index] ?? "") + " " + row.innerText;
  }
  return Object.entries(texts).map(([index, text]) => [Number(index), text]);
}"""

pytestmark = pytest.mark.slow


class Server:
    """An MLflow server on a free port, in its own process group."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port)]
        command += ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", "./artifacts"]
        command += ["--app-name", "ray-ddpm"]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        environment["PYTHONPATH"] = f"{self._installed()}{os.pathsep}{ROOT}"
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 400
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=2):
                    return
            except OSError:
                assert time.monotonic() < deadline, (self.folder / "server.log").read_text()
                time.sleep(0.3)

    def _installed(self) -> Path:
        """Folder with the entry point of the project, as pip would write it."""
        folder = self.folder / "site-packages"
        information = folder / "app-1.0.dist-info"
        information.mkdir(parents=True, exist_ok=True)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: app\nVersion: 1.0\n")
        tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
        points = tree["project"]["entry-points"]["mlflow.app"]
        lines = [f"{name} = {value}" for name, value in points.items()]
        (information / "entry_points.txt").write_text("\n".join(["[mlflow.app]", *lines, ""]))
        return folder

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def sweep(server, tmp_path_factory):
    """Output of a sweep during which the server is killed and restarted."""
    folder = tmp_path_factory.mktemp("user")
    secret = server.url.replace("http://", "http://me:geheim@")
    command = [sys.executable, str(ROOT / "workflows" / "tune.py"), "--data", "heart", "--name", "lost"]
    command += ["--num-trials", "3", "--training.num-updates", "2000", "--tracking-uri", secret]
    command += ["--network.hidden-size", "16", "--metrics.num-samples", "500", "--sampler.num-steps", "10"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 900
        while not list(folder.glob("runs/lost/trials/*/samples.png")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        server.kill()
        time.sleep(5)
        server.start()
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output


def test_no_entry_is_lost_when_the_server_is_killed(sweep, server):
    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("heart")
    runs = client.search_runs([experiment.experiment_id])
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(runs) == 4 and len(children) == 3
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in children:
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "val/elbo_window")]
        assert steps == list(range(250, 250 * len(steps) + 1, 250))
        assert len(steps) == 8 or run.data.tags["status"] == "stopped"
    assert client.get_model_version_by_alias("ray-ddpm-heart", "champion")


def test_the_password_is_never_printed(sweep, server):
    assert "geheim" not in sweep
    assert f"http://***@127.0.0.1:{server.port}/#/experiments/" in sweep


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, sweep, server):
    """A page of a browser that has never seen MLflow, opened at the address that the summary names."""
    context = browser.new_context(viewport={"width": 1600, "height": 1400})
    page = context.new_page()
    page.set_default_timeout(300_000)
    (address,) = re.findall(r"next: (http\S+)", sweep)
    page.goto(address.replace("***@", ""))
    page.get_by_text("matching runs").wait_for()
    yield page
    context.close()


@pytest.fixture
def trials(sweep, server):
    """Runs of the sweep's trials, by rank."""
    client = MlflowClient(server.url)
    experiment = client.get_experiment_by_name("heart")
    runs = client.search_runs([experiment.experiment_id], order_by=["metrics.rank"])
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium (Debian's chromium)")


@needs_browser
def test_the_page_that_the_summary_names_shows_the_trials_best_first(page, trials):
    headers = page.locator("[role=columnheader][col-id]")
    headers.filter(has_text="val/mse").wait_for()
    shown = [text for _, text in sorted(page.evaluate(TEXTS_OF_ROWS))]
    assert all(run.info.run_name in text for run, text in zip(trials, shown, strict=True))
    assert "champion" in shown[0] and page.get_by_text("Sort: rank").is_visible()
    columns = sorted(zip(headers.evaluate_all(COLUMN_NUMBERS), headers.all_inner_texts(), strict=True))
    names = [text.strip() for _, text in columns]
    decisive = ["rank", "sample/distance", "sample/auc", "best_objective", "val/mse"]
    assert [name for name in names if name in decisive] == decisive
    assert names.index("val/mse") < names.index("schedule.num_train_timesteps")
    marked = [text for text in shown if "lowest MSE" in text]
    lowest = min(trials, key=lambda run: run.data.metrics["val/mse"])
    assert [lowest.info.run_name in text for text in marked] == [True]
    assert page.get_by_text("lost: trials, best first").is_visible(), "the view is among those to choose from"


@needs_browser
def test_the_chart_view_begins_with_pictures_and_with_what_decides(page, trials):
    page.goto(f"{page.url}&compareRunsMode=CHART")
    page.get_by_text("What decides, and the MSE").wait_for()
    names = ("Samples", "What decides, and the MSE, which does not", "MSE against samples", "Learning curves")
    tops = [page.get_by_text(name).first.bounding_box()["y"] for name in names[:2]]
    assert tops == sorted(tops)
    assert page.get_by_text(trials[0].info.run_name).count() > 1, "the champion is in the charts"
    wait_for_picture(page)
    titles = page.locator("[data-testid=experiment-view-compare-runs-card]").all_inner_texts()
    assert not [title for title in titles if "_se" in title or "_floor" in title]


@needs_browser
def test_a_click_on_the_champion_shows_why_it_won_and_pictures_of_its_samples(page, trials):
    page.get_by_role("link", name=trials[0].info.run_name).first.click()
    page.get_by_role("tab", name="Model metrics").wait_for()
    assert page.get_by_role("link", name="Runs").count() and not page.get_by_text("Evaluation runs").count()
    assert page.get_by_text("chosen over trial").first.is_visible()
    assert page.get_by_text("heart (").first.is_visible(), "its data set"
    page.get_by_role("tab", name="Model metrics").click()
    wait_for_picture(page)
    assert page.get_by_text("No image logged at this step").count() == 0
    sections = page.get_by_role("button", name="Add chart")
    assert sections.count() >= 4
    assert page.get_by_text(re.compile(r"_se$|_floor$")).count() == 0


@needs_browser
def test_the_compare_view_opens_on_the_objective(page, server, trials):
    runs = json.dumps([run.info.run_id for run in trials[:2]])
    page.goto(f"{server.url}/#/compare-runs?runs={runs}&experiments=[%22{trials[0].info.experiment_id}%22]")
    page.get_by_text("Comparing 2 Runs").wait_for()
    page.locator(".js-plotly-plot text", has_text="best_objective").first.wait_for()
    for text in (trials[0].info.run_name, "schedule.num_train_timesteps", "sample/auc"):
        assert page.get_by_text(text).first.is_visible()


@needs_browser
def test_the_registered_model_names_its_sweep_and_has_its_measures(page, server, trials):
    page.goto(f"{server.url}/#/models/ray-ddpm-heart")
    page.get_by_role("link", name="Version 1").click()
    page.get_by_text("Source Run").wait_for()
    page.get_by_role("link", name="lost").wait_for()
    page.get_by_text("@ champion").wait_for()
    page.get_by_text("test_distance").wait_for()
    page.get_by_role("link", name="sampler").click()
    page.get_by_text("test/sample_distance").first.wait_for()
    assert page.get_by_text("schedule.num_train_timesteps").first.is_visible()


def wait_for_picture(page):
    """Wait until a picture that the server stores is drawn, and not only its frame."""
    page.wait_for_function(
        "[...document.querySelectorAll('img')].some(img => img.naturalWidth > 100 && "
        "!img.src.startsWith('data:'))"
    )
