"""Judge samples of models and other programs: `python -m workflows.evaluate sampler.onnx --data digits`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import get_args

from diffusion.config import DataConfig, FeatureNetwork
from diffusion.data.sources import open_source, resolve
from diffusion.errors import InputError, printable
from diffusion.presets import source_preset
from diffusion.registry import SAMPLERS
from export.contract import FAST
from export.output import check_output
from export.parser import OneLineParser
from export.session import Provider
from workflows.cli.process import run
from workflows.environment import set_defaults
from workflows.evaluation.candidates import MIN_SAMPLES, Draw, open_candidate

_MAX_SAMPLES = 1_000_000


def main(arguments: Sequence[str], prog: str = "python -m workflows.evaluate") -> int:
    """Judge the candidates that the arguments name, and return the exit status.

    Args:
        arguments: command-line arguments.
        prog: name of the command in its help.

    Raises:
        InputError: a candidate or the data cannot be read, or the two do not fit each other.
    """
    options = _parser(prog).parse_args(arguments)
    if not options.output.suffix == ".html":
        raise InputError(f"--output {options.output}: give a file ending in .html")
    check_output(options.output)
    set_defaults(verbose=False)
    names = list(dict.fromkeys(options.candidates))
    read = [open_candidate(name) for name in names]
    config = DataConfig(
        name=resolve(options.data),
        image_size=options.image_size,
        label_column=options.label_column,
        split_column=options.split_column,
        group_column=options.group_column,
        skip_bad_images=options.skip_bad_images,
    )
    source = open_source(config)
    num_samples: int | None = options.num_samples
    if num_samples is not None and not MIN_SAMPLES <= num_samples <= _MAX_SAMPLES:
        raise InputError(f"--num-samples {num_samples}: give {MIN_SAMPLES} to {_MAX_SAMPLES:,}")

    from workflows.terminal import display_path, waiting

    # Imported only after the input has been checked: it takes seconds to import.
    with waiting("loading PyTorch and Ray"):
        from diffusion.evaluation.features import fit_features
        from workflows.data.load import load_or_stream
        from workflows.evaluation.judge import judge
        from workflows.evaluation.report import lines, write_report
        from workflows.ray_runtime.session import start_ray, stop_ray

    try:
        dataset = load_or_stream(source, start_ray=partial(start_ray, verbose=False))
        if num_samples is None:  # as many as a sweep's champion
            num_samples = min(2 * source_preset(source).metrics.num_samples, len(dataset.train))
        draw = Draw(
            num_samples,
            {"seed": options.seed, "sampler": options.sampler, "num_steps": options.steps},
            options.provider,
        )
        candidates = []
        for name, read_samples in zip(names, read, strict=True):
            print(f"reading {printable(name)}", flush=True)
            candidates.append(read_samples(dataset.spec, draw))
        features = fit_features(dataset, options.features, partial(print, flush=True))
        print("comparing with the data", flush=True)
        judged = judge(candidates, dataset, features, add_training=not options.held_out_only)
    finally:
        stop_ray()
    json_path = write_report(judged, dataset, options.output)
    print("\n".join(["", *map(printable, lines(judged)), ""]))
    print(f"{display_path(options.output)}    all metrics and pictures (values: {json_path.name})")
    return 0


def _parser(prog: str) -> OneLineParser:
    parser = OneLineParser(
        prog=prog,
        description="Judge samples of models and of other programs by the metrics of sweeps; several "
        "candidates are compared with the best.",
    )
    parser.add_argument(
        "candidates",
        nargs="+",
        metavar="MODEL_OR_SAMPLES",
        help="a sampler.onnx, the folder of a run, models:/NAME@ALIAS of MLflow's registry, or samples: "
        ".csv, .parquet, .npy or a folder of images",
    )
    parser.add_argument("--data", required=True, help="name of a data set, or path of a folder or table")
    parser.add_argument("--image-size", type=int, help="side in pixels to which images are resized")
    parser.add_argument("--label-column", help="table column that holds a class instead of a coordinate")
    parser.add_argument("--split-column", help="table column that holds the split: train, val or test")
    parser.add_argument("--group-column", help="table column whose equal rows stay in one split")
    parser.add_argument("--skip-bad-images", action="store_true", help="skip unreadable images of the data")
    parser.add_argument(
        "--num-samples",
        type=int,
        help="samples that each model draws; default: as many as a sweep's champion",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the models' noise")
    parser.add_argument("--sampler", choices=[*SAMPLERS, FAST], help="default: the file's own")
    parser.add_argument("--steps", type=int, help="number of sampling steps; default: the file's own")
    parser.add_argument(
        "--metrics.features",
        dest="features",
        choices=get_args(FeatureNetwork),
        default="auto",
        help="network whose features images are compared by, as in a sweep",
    )
    parser.add_argument(
        "--held-out-only",
        action="store_true",
        help="compare with the test and validation splits only, not with training examples as well, which "
        "make smaller differences visible",
    )
    parser.add_argument("--provider", choices=get_args(Provider), default="auto")
    parser.add_argument(
        "--output", type=Path, default=Path("evaluation.html"), help="page to write; a .json stands beside it"
    )
    return parser


if __name__ == "__main__":
    run(main, extra="train")
