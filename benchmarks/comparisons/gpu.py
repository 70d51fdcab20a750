"""One GPU: training a U-Net in bf16, and sampling through onnxruntime-gpu, beside diffusers at its best.

As on the CPU (`unet_training`, `deployment`), on the GPU: diffusers compiled by torch.compile with CUDA
graphs, channels-last, bf16. Not measured on a machine without CUDA.
"""

import tempfile
from pathlib import Path

from benchmarks.comparison import Comparison, Options, Report
from benchmarks.comparisons import deployment, unet_training
from benchmarks.contender import Contender
from benchmarks.sampling import RATE, export_diffusers_unet
from benchmarks.table import Unit, not_measured
from benchmarks.training_data import COLOUR_32, LOSS, UPDATES

TITLE = "One GPU"
GPU = "one GPU with CUDA"
BEST = "diffusers at its best"
TRAINING = "U-Net 3x32x32, batch 256, bf16, one GPU"
BATCHES = (1, 16, 64, 512)


def sampling(batch_size: int) -> str:
    return f"50 steps of DDIM, batch {batch_size}, one GPU"


WORKS = (TRAINING, *(sampling(batch_size) for batch_size in BATCHES))
TRAINING_UNITS = (Unit(UPDATES, higher_is_better=True, goals={BEST: "1.5"}), Unit(LOSS, goals={BEST: "1"}))
SAMPLING_UNIT = Unit(RATE, higher_is_better=True, goals={BEST: "1"})


def run(options: Options) -> Report:
    from export.session import cuda_unavailable_reason

    report, reason = Report(), cuda_unavailable_reason()
    if reason is not None:
        report.lines += ["", f"Not measured: {reason}."]
        report.rows = [
            not_measured(TRAINING, BEST, unit.name, unit.goals[BEST], GPU) for unit in TRAINING_UNITS
        ]
        report.rows += [not_measured(work, BEST, RATE, "1", GPU) for work in WORKS[1:]]
        return report
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sampler.onnx"
        export_diffusers_unet(model)
        works = [training(options.repeats), *(sampled(str(model), batch_size) for batch_size in BATCHES)]
        for each in works:
            report.add(each, options.repeats)
    return report


def training(repeats: int) -> Comparison:
    cuda = {"device": "cuda", "num_updates": 200, "horizon": 200 * (repeats + 1)}
    works = unet_training.comparison(COLOUR_32, "bf16", repeats)
    large = {"training.batch_size": 256}
    ours = {
        name: Contender(each.function, each.arguments | cuda | {"values": each.arguments["values"] | large})
        for name, each in works.ours.items()
    }
    theirs = {
        name: Contender(each.function, each.arguments | cuda | {"batch_size": 256})
        for name, each in works.peers[unet_training.AT_ITS_BEST].items()
    }
    return Comparison(TRAINING, ours, {BEST: theirs}, TRAINING_UNITS)


def sampled(model: str, batch_size: int) -> Comparison:
    works = deployment.comparison(model, "ddim", batch_size)
    theirs = {
        name: Contender(each.function, each.arguments | {"device": "cuda"})
        for peer in (deployment.EAGER, deployment.COMPILED, deployment.BEST)
        for name, each in works.peers[peer].items()
    }
    ours = {
        name: Contender(each.function, each.arguments | {"device": "cuda"})
        for name, each in works.ours.items()
    }
    return Comparison(sampling(batch_size), ours, {BEST: theirs}, [SAMPLING_UNIT])
