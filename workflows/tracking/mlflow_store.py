"""Opens MLflow's stores within seconds; whatever they raise becomes one line."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow import MlflowClient

from diffusion.errors import InputError
from workflows.environment import set_mlflow_requests
from workflows.redaction import redact
from workflows.tracking.database_server import check_connection, first_use, missing_driver

_CONNECT_TIMEOUT = 4  # seconds
_REQUEST_TIMEOUT = 30  # seconds; uploads take longer than a first response


def open_store(uri: str) -> MlflowClient:
    """Connect to a store, or fail within seconds.

    Raises:
        InputError: the store cannot be reached or used.
    """
    # The tracker retries by itself: MLflow's own retries would take minutes.
    set_mlflow_requests(_CONNECT_TIMEOUT)
    with unusable(uri):
        check_connection(uri)
        client = first_use(uri, lambda: _opened(uri))
    set_mlflow_requests(_REQUEST_TIMEOUT)
    return client


def _opened(uri: str) -> MlflowClient:
    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


@contextmanager
def unusable(uri: str) -> Iterator[None]:
    """Raise an InputError for whatever a store raises."""
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(f"--tracking-uri {redact(uri)}: {missing_driver(error)}") from error
    except Exception as error:  # each kind of store raises its own exceptions
        raise InputError(cannot_be_used(uri, str(error))) from error


def cannot_be_used(uri: str, reason: str) -> str:
    first_line = textwrap.shorten(redact(reason.split("\n")[0]), 160, placeholder=" ...")
    return f"--tracking-uri {redact(uri)} cannot be used ({first_line}): fix that, or give another URI"
