"""Readers for tests of benchmarks.fuzz, which do to copies of "good" what a reader must not do."""

import os
import time

from diffusion.errors import InputError


def good(path):
    if path.read_bytes() != b"good":
        raise InputError("damaged: give another")


def raises(path):
    if path.read_bytes() != b"good":
        raise ZeroDivisionError


def rambles(path):
    if path.read_bytes() != b"good":
        raise InputError("damaged " * 200)


def dies(path):
    if path.read_bytes() != b"good":
        os._exit(7)


def waits(path):
    if path.read_bytes() != b"good":
        time.sleep(60.0)


def loops(path):
    while path.read_bytes() != b"good":
        pass


def grows(path):
    if path.read_bytes() != b"good":
        bytearray(1_200_000_000)
