"""What the command line of the sampler understands: `python -m export.sampler`."""

import argparse
from pathlib import Path
from typing import Any, get_args

from diffusion.sampling import SamplerName
from diffusion.schedules import Spacing
from export.arguments import OneLineParser
from export.session import Provider


def sampler_parser() -> OneLineParser:
    """Its flags."""
    parser = OneLineParser(prog="python -m export.sampler", description="Draw samples from a sampler.onnx.")
    parser.add_argument("model", type=Path, nargs="?", help="the ONNX file")
    parser.add_argument(
        "--output", type=Path, default=Path("samples.png"), help=".png, .npy or .csv (points)"
    )
    parser.add_argument("--num-samples", type=int, default=64)
    parser.add_argument("--first-index", type=int, default=0, help="of the seed's samples; 0 is the first")
    add_choices(parser)
    parser.add_argument("--threads", type=int, help="of the processor; default: by the model's size")
    parser.add_argument("--time-limit", type=float, help="seconds that drawing may take")
    parser.add_argument("--doctor", action="store_true", help="say what this machine can run, and stop")
    return parser


def add_choices(parser: argparse.ArgumentParser) -> None:
    """The flags that say how samples are drawn, on whichever command line."""
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=get_args(SamplerName), help="default: the file's own")
    parser.add_argument("--steps", type=int, help="network evaluations; default: the file's own")
    parser.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1")
    parser.add_argument("--spacing", choices=get_args(Spacing), help="which timesteps are visited")
    parser.add_argument("--label", help="a class's name; default: every class in turn")
    parser.add_argument("--guidance-scale", type=float, help="1: the class as learned, 0: no class")
    parser.add_argument("--provider", choices=get_args(Provider), default="auto")


def choices_of(options: argparse.Namespace) -> dict[str, Any]:
    """What those flags say, as `export.sampler.Sampler.sample` calls it."""
    return {
        "seed": options.seed,
        "sampler": options.sampler,
        "num_steps": options.steps,
        "eta": options.eta,
        "spacing": options.spacing,
        "labels": options.label,
        "guidance_scale": options.guidance_scale,
    }
