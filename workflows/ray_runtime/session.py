"""Ray session of this process: start or join Ray without log output, and stop cleanly on signals."""

import gc
import logging
import signal
import socket
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import ray
from ray._private import services

from diffusion.errors import InputError
from workflows.environment import ray_address
from workflows.ray_runtime.auth_token import make_token_private
from workflows.signals import treat_as_interrupt
from workflows.terminal import waiting

_CONNECT_TIMEOUT_SECONDS = 5.0
_started_here = False  # whether `start_ray` started the Ray session of this process, which is its only one


@contextmanager
def restored_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers that Ray, Tune and this project replace, at the end."""
    numbers = [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)
    ]
    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        numbers = []
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # None: not installed by Python, which cannot restore it either
                signal.signal(number, handler)


def start_ray(verbose: bool) -> None:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names; does nothing if Ray is running.

    Args:
        verbose: show Ray's logs.

    Raises:
        InputError: there is no such cluster, it refuses the connection, or Ray's token cannot be made
            private.
    """
    global _started_here
    if ray.is_initialized():
        return
    address = ray_address()
    try:
        if address:
            _check_listening(address)
        if note := make_token_private(create=not address):
            print(f"warning: {note}", file=sys.stderr)
        with waiting("joining the cluster" if address else "starting Ray"), _processes_in_own_sessions():
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
    except InputError:
        raise
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from error  # Ray's answer to SIGTERM while it starts
    except Exception as error:  # Ray raises many types for a missing cluster or a wrong token
        if not address:
            raise
        reason = textwrap.shorten(" ".join(str(error).split()), 160, placeholder=" ...")
        raise InputError(
            f"RAY_ADDRESS {address}: this cluster cannot be joined ({reason}): start it with ray up, or "
            "unset RAY_ADDRESS to run on this machine alone"
        ) from error
    _started_here = True
    treat_as_interrupt()  # replaces the handler that ray.init installs, which leaves runs open


def stop_ray() -> None:
    """End the Ray session that `start_ray` started; one that was running before is left alone."""
    global _started_here
    if _started_here:
        gc.collect()  # Ray's handles in reference cycles: a thread that frees one during the shutdown crashes
        ray.shutdown()
        treat_as_interrupt()
    _started_here = False


@contextmanager
def _processes_in_own_sessions() -> Iterator[None]:
    """Start each of Ray's processes in a session of its own.

    SLURM, systemd, `timeout` and a closed terminal signal the whole process group of a command. Ray must
    outlive such a signal: the driver, which gets it too, stops the trials through it, and ends it afterwards.
    If the driver is killed, Linux kills them with it; elsewhere Ray kills its group, in which they stay.
    """
    original = services.ConsolePopen
    if sys.platform.startswith("linux"):
        services.ConsolePopen = partial(original, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = original


def _check_listening(address: str) -> None:
    """Check that something listens at host:port, since Ray would retry for minutes.

    Raises:
        OSError: nothing listens there.
    """
    host, colon, port = address.rpartition(":")
    if colon and "/" not in address and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT_SECONDS).close()
