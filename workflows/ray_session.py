"""Ray of this process: started or joined, quiet, and stopped cleanly by SIGTERM."""

import logging
import os
import signal

import ray


def stop_at_sigterm() -> None:
    """Take SIGTERM for Ctrl-C: a clean stop that closes every run."""
    signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))


def start_ray(verbose: bool) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names; quietly, unless verbose.

    Where it runs already, nothing happens.
    """
    if ray.is_initialized():
        return
    ray.init(
        address=os.environ.get("RAY_ADDRESS", "local"),
        include_dashboard=False if "RAY_ADDRESS" not in os.environ else None,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
    )
    stop_at_sigterm()  # ray.init puts a handler of its own there, which leaves runs open
