"""Many samples from one file: `python workflows/generate.py --model sampler.onnx --num-samples 50000`."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from diffusion.sampling import SamplerName
from diffusion.schedules import Spacing
from export.arguments import OneLineParser
from export.session import Provider
from workflows.cli import run
from workflows.environment import set_defaults


def main(arguments: Sequence[str]) -> int:
    """Draw samples from command-line arguments and return the exit status."""
    parser = OneLineParser(
        prog="generate.py",
        description="Draw many samples from a sampler.onnx, on all processors or GPUs of a machine or a "
        "cluster. What is interrupted goes on when the same command is given again.",
    )
    parser.add_argument("--model", type=Path, required=True, help="the ONNX file")
    parser.add_argument("--num-samples", type=int, required=True)
    parser.add_argument(
        "--output",
        required=True,
        help="a folder for .npy files, or NAME.parquet for a folder of Parquet ones",
    )
    parser.add_argument("--num-actors", type=int, help="sessions at a time; default: one a GPU or processor")
    parser.add_argument(
        "--block-size", type=int, help="samples a file; default: by their size, 1024 or fewer"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sampler", choices=get_args(SamplerName), help="default: the file's own")
    parser.add_argument("--steps", type=int, help="network evaluations; default: the file's own")
    parser.add_argument("--eta", type=float, help="DDIM's share of fresh noise, 0 to 1")
    parser.add_argument("--spacing", choices=get_args(Spacing), help="which timesteps are visited")
    parser.add_argument("--label", help="a class's name; default: every class in turn")
    parser.add_argument("--guidance-scale", type=float, help="1: the class as learned, 0: no class")
    parser.add_argument("--provider", choices=get_args(Provider), default="auto")
    parser.add_argument("--verbose", action="store_true", help="show Ray's logs")
    options = parser.parse_args(arguments)
    set_defaults(options.verbose)

    from workflows.bulk import (
        Choices,
        generate,
    )  # seconds of imports, once the arguments are known to be good

    choices = Choices(
        seed=options.seed,
        sampler=options.sampler,
        num_steps=options.steps,
        eta=options.eta,
        spacing=options.spacing,
        labels=options.label,
        guidance_scale=options.guidance_scale,
    )
    return generate(
        options.model,
        options.output,
        options.num_samples,
        choices,
        provider=options.provider,
        num_actors=options.num_actors,
        block_size=options.block_size,
        verbose=options.verbose,
    )


if __name__ == "__main__":
    run(main)
