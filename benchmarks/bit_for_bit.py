"""Shows whether two checkouts compute the same, bit for bit.

    python -m benchmarks.bit_for_bit BEFORE [AFTER]            # about 15 minutes for two, on 2 cores

runs the same commands in each checkout (a training with one and with two workers, a small sweep, an export,
a sampling by each sampler) and prints the SHA-256 of everything that a user computes: weights, sampler
tables, samples, metrics and the numeric columns of trials.csv. With two checkouts each line says whether
they agree, and the exit status is 1 where one does not. Both run in the environment that runs this script,
on the same machine: floating-point results differ between CPUs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd

SHORT = ["--training.num-evaluations", "2", "--metrics.num-samples", "200"]
TRAININGS = {
    "heart": ["--data", "heart", "--training.num-updates", "200"],
    "digits": [
        "--data", "digits", "--conditional", "--training.timestep-sampling", "importance",
        "--network.prediction-type", "v_prediction", "--sampler.guidance-scale", "2",
        "--training.num-updates", "200",
    ],
    "digits-unet": [
        "--data", "digits", "--network.kind", "unet", "--network.channel-multipliers", "1", "2",
        "--training.num-updates", "40",
    ],
}  # fmt: skip
# One evaluation a trial: with more, which trials are stopped early depends on which comes first.
SWEEP = [
    "--data", "digits", "--num-trials", "4", "--training.num-updates", "200",
    "--training.num-evaluations", "1", "--metrics.num-samples", "200",
]  # fmt: skip
SAMPLINGS = [
    ["--sampler", name, "--steps", steps, "--spacing", spacing]
    for name in ("ddpm", "ddim", "dpmpp_2m")
    for steps, spacing in (("10", "trailing"), ("7", "leading"), ("9", "linspace"), ("8", "logsnr"))
] + [["--sampler", "ddim", "--eta", "0.5", "--steps", "10"]]


def main() -> int:
    """Run the commands in each checkout and print what they computed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bit_for_bit", description=__doc__)
    parser.add_argument("checkout", type=Path, nargs="+", help="one or two folders with this repository")
    parser.add_argument("--data", choices=TRAININGS, nargs="+", default=list(TRAININGS), help="what to train")
    options = parser.parse_args()
    trainings = {name: TRAININGS[name] for name in options.data}
    found = [digests(folder.absolute(), trainings) for folder in options.checkout]
    if len(found) == 1:
        for name, digest in found[0].items():
            print(f"{digest[:16]}  {name}")
        return 0
    before, after = found
    differing = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    for name in {**before, **after}:
        mark = "DIFFERS  " if name in differing else "identical"
        print(f"{mark}  {before.get(name, 'missing')[:16]}  {after.get(name, 'missing')[:16]}  {name}")
    print(f"{len({**before, **after}) - len(differing)} identical, {len(differing)} different")
    return 1 if differing else 0


def digests(checkout: Path, trainings: dict[str, list[str]]) -> dict[str, str]:
    """SHA-256 of everything that a checkout computes, by what it is."""
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for data, flags in trainings.items():
            for workers in (1, 2):
                name = f"{data}-{workers}"
                run(checkout, folder, "workflows/train.py", *flags, *SHORT, "--num-workers", str(workers),
                    "--name", name)  # fmt: skip
                found |= model(folder / "runs" / name / "model", f"train {data}, {workers} worker(s)")
        run(checkout, folder, "workflows/tune.py", *SWEEP, "--name", "sweep")
        trials = pd.read_csv(folder / "runs/sweep/trials.csv").drop(columns=["seconds"])
        parameters = [name for name in trials.columns if "." in name and "/" not in name]
        numbers = trials.sort_values(parameters).select_dtypes("number")
        for name in numbers.columns:
            found[f"trials.csv: {name}"] = digest(numbers[name].to_numpy().tobytes())
        found |= model(folder / "runs/sweep/champion", "sweep's champion")
        for data in trainings:
            found |= exported(checkout, folder, folder / f"runs/{data}-1/model", data)
    return found


def exported(checkout: Path, folder: Path, trained: Path, data: str) -> dict[str, str]:
    """Of an exported file: its graph, its metadata, and samples by each sampler."""
    import onnx

    file = folder / f"{data}.onnx"
    run(checkout, folder, "-m", "export.to_onnx", str(trained), "--output", str(file))
    proto = onnx.load(file)
    found = {f"export {data}: graph": digest(proto.graph.SerializeToString(deterministic=True))}
    for entry in sorted(proto.metadata_props, key=lambda entry: entry.key):
        value = entry.value
        if entry.key.endswith(".spec"):
            spec = json.loads(value)
            provenance = spec.pop("provenance")  # the rest names the run and the revision
            value = json.dumps([spec, provenance["metrics"], provenance["data_fingerprint"]], sort_keys=True)
        found[f"export {data}: {entry.key}"] = digest(value.encode())
    for flags in SAMPLINGS:
        output = folder / "samples.npy"
        run(checkout, folder, "-m", "export.sampler", str(file), "--num-samples", "7", "--seed", "3",
            "--provider", "cpu", "--output", str(output), *flags)  # fmt: skip
        found[f"sample {data} {' '.join(flags)}"] = digest(np.load(output).tobytes())
    return found


def model(folder: Path, name: str) -> dict[str, str]:
    """Of a model's folder: weights, config, metrics and pictures by PyTorch and ONNX Runtime."""
    tree = json.loads((folder / "config.json").read_text())
    parts = {
        "weights": (folder / "model.safetensors").read_bytes(),
        "config": json.dumps([tree["config"], tree["data"]], sort_keys=True).encode(),
        "metrics": json.dumps(tree["provenance"]["metrics"], sort_keys=True).encode(),
        "parity.json": (folder / "parity.json").read_bytes(),
        "samples.png": (folder / "samples.png").read_bytes(),
        "samples_onnx.png": (folder / "samples_onnx.png").read_bytes(),
    }
    return {f"{name}: {part}": digest(content) for part, content in parts.items()}


def run(checkout: Path, folder: Path, *arguments: str) -> None:
    """Run a Python command of a checkout in a folder of its own.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    command = [str(checkout / arguments[0]) if arguments[0].endswith(".py") else arguments[0], *arguments[1:]]
    print("running", *arguments[:5], "...", file=sys.stderr, flush=True)
    result = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(checkout),
            "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
        },
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout[-2000:]}{result.stderr[-2000:]}")


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
