"""Sampling on the CPU: sampler.onnx beside diffusers' pipelines and OpenVINO.

The same UNet2DModel of 1.0M parameters with random weights everywhere, 1x32x32 images, 50 steps of DDIM or
20 of DPM-Solver++(2M). OpenVINO runs the same file by the same loop, compiled for the batch's size: in
fp32, as ONNX Runtime does, and in the precision that it chooses itself. diffusers stands in fp32, eager and
compiled, and at its best: channels-last, and in bf16, compiled or not, on CPUs with instructions for it.
"""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from benchmarks.comparison import Comparison, Options, Report
from benchmarks.contender import MEMORY, Contender
from benchmarks.sampling import CPU_MS, RATE, export_diffusers_unet
from benchmarks.table import Unit
from diffusion.devices import cpu_has_bf16

TITLE = "Sampling on the CPU"
BATCHES = (1, 16, 64)
SAMPLERS = {"ddim": 50, "dpmpp_2m": 20}
NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++(2M)"}


def work(sampler: str, batch_size: int) -> str:
    return f"{SAMPLERS[sampler]} steps of {NAMES[sampler]}, batch {batch_size}, CPU"


WORKS = tuple(work(sampler, batch_size) for sampler in SAMPLERS for batch_size in BATCHES)
EAGER, COMPILED, BEST = "diffusers eager", "diffusers compiled", "diffusers at its best"
OPENVINO, OPENVINO_BEST = "OpenVINO, fp32", "OpenVINO, its own precision"
EAGER_GOALS = {1: "3", 16: "1.8", 64: "1.6"}


def run(options: Options) -> Report:
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sampler.onnx"
        export_diffusers_unet(model)
        for sampler in SAMPLERS:
            for batch_size in BATCHES:
                works = comparison(str(model), sampler, batch_size, bf16=cpu_has_bf16())
                report.add(works, options.repeats)
    return report


def comparison(model: str, sampler: str, batch_size: int, *, bf16: bool = True) -> Comparison:
    common = {"sampler": sampler, "num_steps": SAMPLERS[sampler], "batch_size": batch_size}

    def diffusers(**settings: bool) -> Contender:
        return Contender("benchmarks.peers.diffusers_sampling:sample", common | settings)

    def openvino(name: str, precision: str | None) -> dict[str, Contender]:
        arguments = common | {"model": model, "precision": precision}
        if find_spec("openvino") is None:
            return {}
        return {name: Contender("benchmarks.peers.openvino_sampling:sample", arguments)}

    best = {"diffusers, channels-last": diffusers(channels_last=True)}
    if bf16:
        best |= {
            "diffusers, bf16": diffusers(bf16=True),
            "diffusers, compiled, bf16": diffusers(compiled=True, bf16=True),
        }
    goals = {EAGER: EAGER_GOALS[batch_size], COMPILED: "1", OPENVINO: "1"}
    return Comparison(
        work(sampler, batch_size),
        {"ours": Contender("benchmarks.sampling:sample_by_onnx_runtime", common | {"model": model})},
        {
            EAGER: {EAGER: diffusers()},
            COMPILED: {COMPILED: diffusers(compiled=True)},
            BEST: best,
            OPENVINO: openvino(OPENVINO, "f32"),
            OPENVINO_BEST: openvino(OPENVINO_BEST, None),
        },
        [Unit(RATE, higher_is_better=True, goals=goals), Unit(CPU_MS), Unit(MEMORY)],
    )
