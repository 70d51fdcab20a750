"""How far apart are the samples of one seed in every runtime that can draw them?

    python workflows/train.py --data digits --num-updates 4000 --name digits
    python workflows/train.py --data digits --conditional --num-updates 4000 --name digits-classes
    python workflows/train.py --data heart --num-updates 3000 --name heart
    python -m benchmarks.runtimes runs/digits/model runs/digits-classes/model runs/heart/model

Needs the extra `test`, Node.js with npm, `make javascript`, and Chromium. Writes
benchmarks/results/runtimes.md: for each model and sampler the largest difference from `export.Sampler`, over
all values, samples and rows of the sampler's table, in standard deviations of the data.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
from numpy.typing import NDArray
from playwright.sync_api import sync_playwright

from benchmarks.javascript_runs import camel_case, chromium_path, in_browser, in_node
from benchmarks.table import RESULTS
from diffusion.registry import SAMPLERS
from diffusion.training.checkpoints import TrainedModel
from export.contract import LABEL, SamplerSpec
from export.loop_format import loop_feeds
from export.sampler import Sampler
from export.torch_sampler import TorchSampler
from export.whole_loop import whole_loop

SEED, NUM_STEPS, GUIDANCE_SCALE = 0, 20, 3.0
# What each runtime has to keep to, in standard deviations of the data.
LIMITS = {
    "PyTorch": 1e-5,
    "whole loop, noise as input": 1e-4,
    "whole loop, seed as input": 1e-4,
    "Node.js": 1e-4,
    "browser (WebAssembly)": 1e-4,
    "OpenVINO, fp32": 1e-4,
}


class OpenVinoSampler(TorchSampler):
    """Draws as TorchSampler does, with OpenVINO in float32."""

    def __init__(self, file: Path, sampler: Sampler) -> None:
        super().__init__(None, sampler.spec, SEED)  # type: ignore[arg-type]
        precision = {"INFERENCE_PRECISION_HINT": "f32"}
        self._model = openvino.Core().compile_model(file, "CPU", precision)

    def outputs(self, inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """The network's outputs, each [batch, *shape]."""
        found = self._model(inputs)
        return [found[name].copy() for name in self.spec.graph_outputs]


class DeployedSampler(TorchSampler):
    """Draws as TorchSampler does, with the network that `export.Sampler` runs, and so shows its rows."""

    def __init__(self, sampler: Sampler) -> None:
        super().__init__(None, sampler.spec, SEED)  # type: ignore[arg-type]
        self._sampler = sampler

    def outputs(self, inputs: dict[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """The network's outputs, each [batch, *shape]."""
        x, level = inputs.pop("x"), inputs.pop(self.spec.level_input)
        return [self._sampler.denoise(x, level, inputs.get(LABEL)).astype(np.float32)]


def choices(spec: SamplerSpec) -> list[dict[str, Any]]:
    """Options of `sample`: none, each sampler of the registry, and with classes also each with guidance."""
    steps = min(NUM_STEPS, spec.noise_schedule.num_train_timesteps)
    unguided = [{}, *({"sampler": name, "num_steps": steps} for name in SAMPLERS)]
    return unguided + [{**options, "guidance_scale": GUIDANCE_SCALE} for options in unguided if spec.classes]


def limit(runtime: str, options: dict[str, Any]) -> float:
    """Largest difference that a runtime may have with these options of `sample`.

    Guidance of w multiplies the differences of the network's two outputs by up to 2 w - 1.
    """
    return LIMITS[runtime] * max(1.0, 2.0 * options.get("guidance_scale", 1.0) - 1.0)


def differences(folder: Path, count: int, chromium: Any) -> Iterator[tuple[dict[str, Any], dict[str, float]]]:
    """Largest difference of each runtime from `export.Sampler`, in standard deviations of the data.

    Args:
        folder: folder of a model without conditions, and its sampler.onnx.
        count: number of samples.
        chromium: a browser of playwright.

    Yields:
        Options of `export.Sampler.sample`, and the difference of each runtime of `LIMITS`.
    """
    file = folder / "sampler.onnx"
    content = file.read_bytes()
    sampler = Sampler(content, provider="cpu")
    spec, std = sampler.spec, np.array(sampler.spec.data["std"])
    torch_like = {
        "PyTorch": TorchSampler.of(TrainedModel.load(folder)),
        "OpenVINO, fp32": OpenVinoSampler(file, sampler),
    }
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3  # it warns of inputs that may be left out
    loops = {
        name: onnxruntime.InferenceSession(whole_loop(content, in_graph_noise=in_graph), quiet)
        for name, in_graph in (("whole loop, noise as input", False), ("whole loop, seed as input", True))
    }
    chosen = choices(spec)
    runs = [
        {
            "file": str(file),
            "count": count,
            "options": {"seed": SEED, "batchSize": count, **camel_case(options)},
            "watch": True,
        }
        for options in chosen
    ]
    in_javascript = {"Node.js": in_node(runs), "browser (WebAssembly)": in_browser(chromium, runs)}
    for number, options in enumerate(chosen):
        table = sampler.table(**{name: options[name] for name in ("sampler", "num_steps") if name in options})
        scale = options.get("guidance_scale", spec.sampler["guidance_scale"])
        drawn = sampler.sample(count, seed=SEED, **options)
        _, *states = DeployedSampler(sampler).states(count, table, scale)
        rows = [spec.denormalise(x) for x in states]
        assert np.abs(rows[-1] - drawn).max() <= 1e-6 * std.max(), "the rows are not those of `sample`"

        def of_rows(actual: Sequence[NDArray[Any]], rows: Sequence[NDArray[Any]] = rows) -> float:
            pairs = zip(actual, rows, strict=True)
            return max(float((np.abs(ours - theirs) / std).max()) for ours, theirs in pairs)

        found = {}
        for name, other in torch_like.items():
            _, *states = other.states(count, table, scale)
            found[name] = of_rows([spec.denormalise(x) for x in states])
        for name, outcomes in in_javascript.items():
            previews = outcomes[number]["previews"]
            found[name] = of_rows([np.reshape(each["x"], drawn.shape) for each in previews])
        for name, session in loops.items():
            feeds = loop_feeds(
                spec,
                count,
                SEED,
                in_graph_noise="seed" in name,
                table=table,
                guidance_scale=scale if spec.classes else None,
            )
            found[name] = float((np.abs(session.run(["samples"], feeds)[0] - drawn) / std).max())
        yield options, found


def report(found: Sequence[tuple[str, dict[str, Any], dict[str, float]]]) -> str:
    """The results as a page in Markdown, from models' names, options and differences."""
    versions = f"ONNX Runtime {onnxruntime.__version__}, OpenVINO {openvino.__version__.split('-')[0]}"
    lines = [
        "# One seed in every runtime",
        "",
        "The largest difference from `export.Sampler` over all values, samples and rows of the sampler's",
        "table (a whole loop: over the finished samples), in standard deviations of the data.",
        f"{versions}; in JavaScript the packages of `javascript/package-lock.json`.",
        f"With guidance of {GUIDANCE_SCALE:g} the limits are {2 * GUIDANCE_SCALE - 1:g} times as large:",
        "it multiplies the differences of two outputs. The models are those of the commands in",
        "`benchmarks/runtimes.py`.",
        "",
        "| model | sampler | " + " | ".join(LIMITS) + " |",
        "|---|---|" + "---|" * len(LIMITS),
        "| | at most | " + " | ".join(f"{limit:.0e}" for limit in LIMITS.values()) + " |",
    ]
    for model, options, values in found:
        name = options.get("sampler", "the file's own")
        guided = f", guidance {options['guidance_scale']:g}" if "guidance_scale" in options else ""
        figures = " | ".join(f"{values[runtime]:.1e}" for runtime in LIMITS)
        lines.append(f"| {model} | {name}{guided} | {figures} |")
    largest = (max(values[runtime] for *_, values in found) for runtime in LIMITS)
    lines.append("| largest | | " + " | ".join(f"{value:.1e}" for value in largest) + " |")
    return "\n".join([*lines, ""])


def main() -> int:
    """Compare, write the results, and return 1 if a difference is too large."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtimes")
    parser.add_argument("folders", nargs="+", type=Path, help="folders such as runs/NAME/champion")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS / "runtimes.md")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium_path(), args=["--no-sandbox", "--disable-gpu"]
        )
        found = [
            (folder.resolve().parent.name, *each)
            for folder in arguments.folders
            for each in differences(folder, arguments.num_samples, browser)
        ]
        browser.close()
    page = report(found)
    arguments.output.write_text(page)
    print(page)
    return int(
        any(value > limit(name, options) for _, options, values in found for name, value in values.items())
    )


if __name__ == "__main__":
    raise SystemExit(main())
