"""Growth: how the time grows with the size of the work, as the slope in a log-log diagram.

A slope of 1 is as the size, 2 as its square. Ratios say how many times less ours has grown than the peer's
from the smallest to the largest size. Images: an update of a U-Net (width 16, 1:2:2, batch 8) at 16, 32 and
64 pixels a side. Batch: the same at 28 pixels, batches of 8, 32 and 128. T: 1,000 updates of the heart's
MLP with T of 50 to 5,000. Samples: 5 steps of DDIM for 16 to 1,024 images, by the default batch size;
diffusers' in one batch. Trials: a sweep of 8 and of 32 tiny trials.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.comparison import Measured, Options, Report, measure
from benchmarks.comparisons import heart, unet_training
from benchmarks.contender import SECONDS, Contender
from benchmarks.sampling import RATE, export_diffusers_unet
from benchmarks.table import Row, hardware, not_measured
from benchmarks.training_data import GREY_28, UPDATES, digits_at

TITLE = "Growth"
SLOPE = "log-log slope"
SIDES, BATCHES, TIMESTEPS, SAMPLES, TRIALS = (
    (16, 32, 64),
    (8, 32, 128),
    (50, 500, 5000),
    (16, 128, 1024),
    (8, 32),
)
DIFFUSERS, TUTORIAL, OPTUNA = "diffusers", "the tutorial's loop", "a bare Optuna loop with MLflow"
Make = Callable[[int], Contender]


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line through log(seconds) over log(size)."""
    return statistics.linear_regression(
        [math.log(each) for each in sizes], [math.log(each) for each in seconds]
    ).slope


def growth_row(
    work: str,
    peer: str,
    sizes: Sequence[int],
    ours: Sequence[Sequence[float]],
    peers: Sequence[Sequence[float]],
    goal: str,
) -> Row:
    """The row of a size.

    Args:
        work: what grows.
        peer: the peer.
        sizes: from the smallest to the largest.
        ours, peers: seconds by repeat and size.
        goal: the largest slope that is allowed.
    """
    slopes = [[slope(sizes, each) for each in side] for side in (ours, peers)]
    grown = [[each[-1] / each[0] for each in side] for side in (ours, peers)]
    ratios = [their / our for our, their in zip(*grown, strict=True)]
    figures = (
        *(statistics.median(each) for each in slopes),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
    )
    return Row(work, peer, SLOPE, *(f"{each:.3g}" for each in figures), goal, hardware())


def image_training(side: int, batch_size: int) -> tuple[Contender, Contender]:
    """Ours and diffusers', six updates at a time."""
    data = digits_at(1, side)
    common = {"data": data, "num_updates": 10, "horizon": 1000}
    values = unet_training.values(GREY_28, "fp32") | {
        "training.batch_size": batch_size,
        "network.attention_resolutions": (side // 4,),
    }
    network = {
        "batch_size": batch_size,
        "learning_rate": 1e-3,
        "base_channels": 16,
        "channel_multipliers": (1, 2, 2),
    }
    return (
        Contender("benchmarks.ours:train_images", common | {"values": values}),
        Contender(
            "benchmarks.peers.diffusers_training:train_images", common | network | {"as_its_script": False}
        ),
    )


def heart_with(num_timesteps: int) -> tuple[Contender, Contender]:
    ours = Contender(
        "benchmarks.ours:train_heart",
        {
            "num_updates": 1000,
            "seed": 0,
            "values": heart.VALUES | {"schedule.num_train_timesteps": num_timesteps},
        },
        fresh=True,
    )
    theirs = {"num_updates": 1000, "num_train_timesteps": num_timesteps}
    return ours, Contender("benchmarks.peers.tutorial:train_heart", theirs, fresh=True)


def sampling(model: str, count: int) -> tuple[Contender, Contender]:
    common = {"sampler": "ddim", "num_steps": 5}
    ours = common | {"model": model, "batch_size": None, "num_samples": count}
    return (
        Contender("benchmarks.sampling:sample_by_onnx_runtime", ours),
        Contender("benchmarks.peers.diffusers_sampling:sample", common | {"batch_size": count}),
    )


def sweep(num_trials: int) -> tuple[Contender, Contender]:
    arguments = {"num_trials": num_trials}
    return (
        Contender("benchmarks.sweeps:tune", arguments),
        Contender("benchmarks.sweeps:optuna_loop", arguments, fresh=True),
    )


WORKS_BY_SIZE: Mapping[str, tuple[Sequence[int], str, str]] = {
    "growth with the image's side": (SIDES, DIFFUSERS, "2"),
    "growth with the batch": (BATCHES, DIFFUSERS, "1"),
    "growth with T": (TIMESTEPS, TUTORIAL, "0.1"),
    "growth with the samples": (SAMPLES, DIFFUSERS, "1"),
    "growth with the trials": (TRIALS, OPTUNA, "1"),
}
WORKS = tuple(WORKS_BY_SIZE)


def run(options: Options) -> Report:
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "sampler.onnx"
        export_diffusers_unet(model)
        makers: list[Callable[[int], tuple[Contender, Contender]]] = [
            lambda side: image_training(side, 8),
            lambda batch_size: image_training(28, batch_size),
            heart_with,
            lambda count: sampling(str(model), count),
            sweep,
        ]
        for (work, (sizes, peer, goal)), make in zip(WORKS_BY_SIZE.items(), makers, strict=True):
            print(work, flush=True)
            contenders = {}
            for size in sizes:
                contenders |= dict(zip((f"ours, {size}", f"{peer}, {size}"), make(size), strict=True))
            measured = measure(contenders, options.repeats)
            if len(measured) < len(contenders):
                report.rows.append(not_measured(work, peer, SLOPE, f"at most {goal}"))
                continue
            ours, peers = (seconds_by_size(measured, side, sizes) for side in ("ours", peer))
            report.rows.append(growth_row(work, peer, sizes, ours, peers, f"at most {goal}"))
            report.lines += ["", f"## {work}", "", "| size | ours, s | its peer's, s |", "|---|---|---|"]
            for place, size in enumerate(sizes):
                cells = [f"{statistics.median(each[place] for each in side):.4g}" for side in (ours, peers)]
                report.lines.append(f"| {size:,} | {' | '.join(cells)} |")
    return report


def seconds_by_size(measured: Measured, side: str, sizes: Sequence[int]) -> list[list[float]]:
    """Seconds of one side, by repeat and size: of an update, a call, or the whole."""

    def seconds(figures: Mapping[str, float], size: int) -> float:
        if UPDATES in figures:
            return 1.0 / figures[UPDATES]
        return size / figures[RATE] if RATE in figures else figures[SECONDS]

    by_size = [[seconds(each, size) for each in measured[f"{side}, {size}"]] for size in sizes]
    return [list(each) for each in zip(*by_size, strict=True)]
