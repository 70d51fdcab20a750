"""Ray of this process: started or joined, quiet, and stopped cleanly by SIGTERM."""

import logging
import os
import signal
import socket
import textwrap

import ray

from diffusion.errors import InputError

_SECONDS_TO_ANSWER = 5.0


def stop_at_sigterm() -> None:
    """Take SIGTERM for Ctrl-C: a clean stop that closes every run."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def start_ray(verbose: bool) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names; quietly, unless verbose.

    Where it runs already, nothing happens.

    Raises:
        InputError: there is no such cluster, or it does not let us in.
    """
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    try:
        if address:
            _knock(address)
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=verbose,
            logging_level=logging.INFO if verbose else logging.ERROR,
        )
    except Exception as error:  # Ray has many for a cluster that is not there, or wants another token
        if not address:
            raise
        reason = textwrap.shorten(" ".join(str(error).split()), 160, placeholder=" ...")
        raise InputError(
            f"RAY_ADDRESS {address}: this cluster cannot be joined ({reason}): start it with ray up, or "
            "unset RAY_ADDRESS to run on this machine alone"
        ) from error
    stop_at_sigterm()  # ray.init puts a handler of its own there, which leaves runs open


def _knock(address: str) -> None:
    """See that something listens at host:port, since Ray would try for minutes.

    Raises:
        OSError: nothing does.
    """
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
