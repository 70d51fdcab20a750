"""A command-line parser whose errors are one line."""

import argparse
from typing import NoReturn

from diffusion.errors import printable


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit; argparse calls this for bad arguments."""
        self.exit(2, f"error: {printable(message)}; --help shows what is allowed\n")
