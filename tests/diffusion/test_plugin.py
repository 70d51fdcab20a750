"""Implementations of a package that is not the project: tests/plugin, whose files docs/extending.md shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"


def run(program, *, plugin=True, timeout=300):
    """What a fresh process prints as JSON in its last line, with the package installed or not."""
    path = [str(ROOT), *([str(PLUGIN)] if plugin else [])]
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_the_page_shows_the_files_of_the_package():
    """So its examples are those that the tests below run."""
    page = (ROOT / "docs" / "extending.md").read_text()
    before, _, after = page.partition("## A data source")
    page = before + after.partition("## A cluster kind")[2]
    blocks = [block.split("\n", 1)[1] for block in page.split("```")[1::2] if block.startswith("python\n")]
    sources = "\n".join(path.read_text() for path in (PLUGIN / "more_diffusion").glob("*.py"))
    assert len(blocks) >= 7
    for block in blocks:
        assert block in sources
    assert (PLUGIN / "more_diffusion-1.0.dist-info" / "entry_points.txt").read_text() in page


def test_names_are_listed_and_checked_without_torch():
    names = run("""
import contextlib, io, json, sys
from diffusion.config import Config
from diffusion.registry import NETWORKS, OBJECTIVES, SAMPLE_METRICS, SAMPLERS, SCHEDULES
Config().with_values({
    "sampler.name": "euler_ancestral", "sampler.eta": 0.5, "schedule.kind": "geometric",
    "network.kind": "plain", "metrics.objective": "mean_shift",
})
assert "torch" not in sys.modules
try:
    from workflows.cli.parsing import parse_train_options
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        parse_train_options(["--data", "heart", "--help-all"])
except SystemExit:
    help_all = " ".join(printed.getvalue().replace("\\n", " ").split())
own = "ddpm, ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, heun, heun_churn"
assert f"sampler: {own}, euler_ancestral, midpoint objective:" in help_all, help_all[:800]
from export.cli import sampler_parser
assert sampler_parser().parse_args(["--sampler", "midpoint"]).sampler == "midpoint"
print(json.dumps([list(each) for each in (SAMPLERS, SCHEDULES, NETWORKS, OBJECTIVES, SAMPLE_METRICS)]))
""")
    assert [each[-1] for each in names] == ["midpoint", "geometric", "plain", "mean_shift", "mean_shift"]
    assert names[0][-2:] == ["euler_ancestral", "midpoint"] and "heun" in names[0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_table_of_a_two_stage_sampler_is_a_plain_loop(prediction_type):
    """The midpoint method written out in u = x / sqrt(A) and sigma; the last step has one evaluation."""
    difference, shape, steps, ancestral = run(f"""
import json
import numpy as np
from diffusion.process.samplers import sampler_table, trajectory, last_sample
from diffusion.process.schedules import NoiseSchedule, linear_betas, respaced_timesteps

schedule, kind = NoiseSchedule(linear_betas(60, 1e-3, 0.2)), "{prediction_type}"
def network(x, t):
    return np.sin(1.7 * x + 0.05 * t)
def predict(x, t):
    A = schedule.alphas_cumprod[t]
    signal, noise, out = np.sqrt(A), np.sqrt(1.0 - A), network(x, t)
    x0 = (x - noise * out) / signal if kind == "epsilon" else signal * x - noise * out
    return np.clip(x0, -0.8, 0.8)

visited = respaced_timesteps(schedule, 9, "logsnr")
scale = np.sqrt(schedule.alphas_cumprod)
sigma = np.sqrt(1.0 - scale**2) / scale
start = np.random.default_rng(0).standard_normal((7, 2))
u = start / scale[visited[0]]
for t, s in zip(visited, visited[1:]):
    m = (t + s + 1) // 2
    middle = u + (sigma[m] - sigma[t]) * (u - predict(u * scale[t], t)) / sigma[t]
    u = u + (sigma[s] - sigma[t]) * (middle - predict(middle * scale[m], m)) / sigma[m]
expected = predict(u * scale[visited[-1]], visited[-1])
table = sampler_table(schedule, "midpoint", 9, prediction_type=kind, clip=(-0.8, 0.8))
actual = last_sample(trajectory(network, start, table, lambda row: None))
euler, ddim = (sampler_table(schedule, name, 9, eta=0.7) for name in ("euler_ancestral", "ddim"))
print(json.dumps([
    float(abs(actual - expected).max()), table.coefficients.shape, table.num_steps,
    float(abs(euler.coefficients[:, :7] - ddim.coefficients[:, :7]).max()),
]))
""")
    assert difference < 1e-12
    assert (shape, steps) == ([17, 9], 9)
    assert ancestral < 1e-12  # Euler's ancestral sampler is DDIM in other variables


@pytest.mark.slow
def test_everything_is_used_by_training_export_and_sampling(tmp_path):
    file = tmp_path / "sampler.onnx"
    metrics, cases, steps, rows = run(f"""
import json
import torch
from pathlib import Path
from diffusion.data.dataset import load_dataset
from diffusion.training.loop import Training
from export.to_onnx import export_onnx
from export.sampler import Sampler
from workflows.cli.parsing import parse_train_options

torch.set_num_threads(1)
_, options = parse_train_options([
    "--data", "heart", "--sampler.name", "midpoint", "--sampler.num-steps", "6",
    "--schedule.kind", "geometric", "--schedule.num-train-timesteps", "20", "--schedule.beta-end", "0.3",
    "--network.kind", "plain", "--network.hidden-size", "32",
    "--metrics.objective", "mean_shift", "--metrics.num-samples", "100",
    "--metrics.num-examples", "50", "--training.num-updates", "20", "--training.num-evaluations", "2",
]).open_data()
config = options.config()
results = []
Training(config, load_dataset(config.data), results.append).run()
content, cases = export_onnx(results[-1].model)
Path({str(file)!r}).write_bytes(content)
spec = Sampler(content, "cpu").spec
print(json.dumps([
    [result.metrics for result in results], [(case.name, case.passed) for case in cases],
    [spec.sampler["num_steps"], spec.table.num_steps], len(spec.table.timesteps),
]))
""")
    for each in metrics:  # sampled at every evaluation, since the objective needs it
        assert each["objective"] == each["sample/mean_shift"] > 0.0
        assert {"sample/mean_shift_floor", "sample/mean_shift_floor_se", "sample/distance"} <= set(each)
        assert each["sample/network_evaluations"] == 11.0
    names = [name for name, _ in cases]
    assert {"deployed sampler", "midpoint, 20 steps, clipped", "euler_ancestral, 20 steps, clipped"} <= set(
        names
    )
    assert all(passed for _, passed in cases)
    assert (steps, rows) == ([6, 6], 11)
    shape, error = run(
        f"""
import json
from export.sampler import Sampler
sampler = Sampler({str(file)!r}, "cpu")
try:
    sampler.sample(3, num_steps=5)
except ValueError as problem:
    print(json.dumps([sampler.sample(3).shape, str(problem)]))
""",
        plugin=False,
    )
    assert shape == [3, 2]  # the table in the file is all that its own sampler needs
    assert error.startswith("sampler 'midpoint': choose one of ddpm, ddim, dpmpp_2m, ")
