"""Command-line parsing: the flags of `python -m export.sampler`."""

import argparse
from pathlib import Path
from typing import Any, get_args

from diffusion.errors import InputError
from diffusion.process.schedules import Spacing
from diffusion.registry import SAMPLERS
from export.contract import FAST
from export.parser import OneLineParser
from export.session import Arena, DeviceOptions, Provider


def sampler_parser(prog: str = "python -m export.sampler") -> OneLineParser:
    """Build the parser of `python -m export.sampler`; `prog` is the name of the command in its help."""
    parser = OneLineParser(prog=prog, description="Draw samples from a sampler.onnx.")
    parser.add_argument("model", type=Path, nargs="?", help="the ONNX file")
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help=".png, .npy or .csv (points only)"
    )
    parser.add_argument(
        "--num-samples",
        type=int,
        help="default: 64; with a table or array of known or given rows 1 for each row; 8 frames between two",
    )
    parser.add_argument(
        "--first-index", type=int, default=0, help="index of the first sample of the seed; default: 0"
    )
    add_sampling_flags(parser)
    _add_given_flags(parser)
    parser.add_argument(
        "--condition",
        action="append",
        default=[],
        metavar="NAME=FILE.npy",
        help="value of a condition of the model, for all samples or one per sample: a file of numpy.save, or "
        "a number; once for each condition",
    )
    parser.add_argument(
        "--then",
        type=Path,
        action="append",
        default=[],
        metavar="SECOND.onnx",
        help="a model of train.py --super-resolution, which draws larger images for those of MODEL; may be "
        "given again for a third one",
    )
    parser.add_argument(
        "--low-resolution-noise",
        type=float,
        help="with --then: standard deviation of the noise added to the images between two models; default: "
        "the file's own",
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: chosen by the size of the model")
    parser.add_argument(
        "--time-limit", type=float, help="fail if sampling takes longer than this, in seconds"
    )
    parser.add_argument("--device-id", type=int, default=0, help="number of the GPU; default: 0")
    parser.add_argument(
        "--gpu-memory-gb", type=float, help="memory of the GPU that ONNX Runtime may take; default: no limit"
    )
    parser.add_argument(
        "--arena",
        choices=get_args(Arena),
        default="kSameAsRequested",
        help="how ONNX Runtime's memory on the GPU grows",
    )
    parser.add_argument(
        "--tf32",
        action="store_true",
        help="let a GPU round products to 10 bits: faster, and samples move by 5e-4 standard deviations",
    )
    parser.add_argument("--doctor", action="store_true", help="report what this machine can run, and exit")
    return parser


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose how samples are drawn, which several command lines share."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sampler",
        choices=[*SAMPLERS, FAST],
        help=f"default: the file's own; {FAST}: the file's choice among those of few steps",
    )
    parser.add_argument("--steps", type=int, help="number of sampling steps; default: the file's own")
    parser.add_argument(
        "--eta",
        type=float,
        help="fraction of fresh noise, 0 to 1, in ddim (default: 0) and heun_churn (default: 0.25)",
    )
    parser.add_argument("--spacing", choices=get_args(Spacing), help="how the timesteps are chosen")
    parser.add_argument("--label", help="name of a class; default: cycle through all classes")
    parser.add_argument(
        "--guidance-scale", type=float, help="1: the class as learned, more: exaggerated, 0: no class"
    )
    parser.add_argument("--provider", choices=get_args(Provider), default="auto")


def _add_given_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags about known parts of the samples and samples to start from."""
    group = parser.add_argument_group(
        "what is given of the samples",
        "Images have the size of the model's; a .npy array is in data units, of one sample or of rows.",
    )
    group.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="what the samples shall have: an image, with --mask; for points a .csv table, whose empty cells "
        "and missing columns are drawn; or a .npy array, in which NaN is drawn",
    )
    group.add_argument(
        "--mask",
        type=Path,
        metavar="IMAGE",
        help="which pixels of --known are drawn anew: white; those that are black are kept, as in diffusers. "
        "Grey counts as the nearer of the two, and transparent pixels as white",
    )
    group.add_argument(
        "--resampling",
        type=int,
        metavar="N",
        help="with --known: run each step N times, which fits the drawn part better to the known one, for N "
        "times as many network calls (RePaint); default: 1",
    )
    group.add_argument(
        "--jump-length",
        type=int,
        metavar="N",
        help="with --resampling: repeat N steps together; default: 1",
    )
    group.add_argument(
        "--start-from-image",
        type=Path,
        metavar="FILE",
        help="noise this image, or .csv or .npy rows for points, and denoise it, instead of pure noise",
    )
    group.add_argument(
        "--interpolate",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="draw --num-samples frames on a path from one image or point to another",
    )
    group.add_argument(
        "--strength",
        type=float,
        help="with --start-from-image or --interpolate: fraction of the steps that run, above 0 and up to "
        "1, by default 0.6: the smaller, the closer to what is given",
    )


def check_cascade_flags(options: argparse.Namespace) -> None:
    """Check the flags about a cascade, before a model is opened.

    Raises:
        InputError: a flag needs --then, or does not go with it.
    """
    if not options.then and options.low_resolution_noise is not None:
        raise InputError("--low-resolution-noise: it needs --then; give that too, or leave it out")
    for name in ("known", "start_from_image", "interpolate"):
        if options.then and getattr(options, name) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag}: it does not go with --then; give one of them")


def device_options(options: argparse.Namespace) -> DeviceOptions:
    """Convert the parsed flags of a GPU.

    Raises:
        InputError: a value is out of range.
    """
    gigabytes = options.gpu_memory_gb
    if gigabytes is not None and not 0.0 < gigabytes <= 1e6:
        raise InputError(f"--gpu-memory-gb {gigabytes:g}: give a number of gigabytes greater than 0")
    limit = None if gigabytes is None else int(gigabytes * 1e9)
    return DeviceOptions(options.device_id, limit, options.arena, options.tf32)


def sampling_options(options: argparse.Namespace) -> dict[str, Any]:
    """Convert the parsed sampling flags to keyword arguments of `export.sampler.Sampler.sample`."""
    return {
        "seed": options.seed,
        "sampler": options.sampler,
        "num_steps": options.steps,
        "eta": options.eta,
        "spacing": options.spacing,
        "labels": options.label,
        "guidance_scale": options.guidance_scale,
    }
