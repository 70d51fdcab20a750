"""What the command line of the sampler understands: `python -m export.sampler`."""

from pathlib import Path
from typing import get_args

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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-index", type=int, default=0, help="of the seed's samples; 0 is the first")
    parser.add_argument("--sampler", choices=get_args(SamplerName), help="default: the file's own")
    parser.add_argument("--steps", type=int, help="network evaluations; default: the file's own")
    parser.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1")
    parser.add_argument("--spacing", choices=get_args(Spacing), help="which timesteps are visited")
    parser.add_argument("--label", help="a class's name; default: every class in turn")
    parser.add_argument("--guidance-scale", type=float, help="1: the class as learned, 0: no class")
    parser.add_argument("--provider", choices=get_args(Provider), default="auto")
    parser.add_argument("--threads", type=int, help="of the processor; default: by the model's size")
    parser.add_argument("--time-limit", type=float, help="seconds that drawing may take")
    parser.add_argument("--doctor", action="store_true", help="say what this machine can run, and stop")
    return parser
