"""Many samples from one file: `python workflows/generate.py --model sampler.onnx --num-samples 50000`."""

from collections.abc import Sequence
from pathlib import Path

from export.arguments import OneLineParser
from export.command import add_choices, choices_of
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
    add_choices(parser)
    parser.add_argument("--verbose", action="store_true", help="show Ray's logs")
    options = parser.parse_args(arguments)
    set_defaults(options.verbose)

    from workflows.bulk import Choices, generate  # seconds, once the arguments are known to be good

    return generate(
        options.model,
        options.output,
        options.num_samples,
        Choices(**choices_of(options)),
        provider=options.provider,
        num_actors=options.num_actors,
        block_size=options.block_size,
        verbose=options.verbose,
    )


if __name__ == "__main__":
    run(main)
