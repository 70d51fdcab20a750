"""Command lines whose complaints are one line."""

import argparse
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad arguments."""
        self.exit(2, f"error: {message}; --help shows what is allowed\n")
