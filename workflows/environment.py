"""Every environment variable that is read or set.

This module imports none of torch, ray and mlflow, which read some of these variables when they are imported.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.errors import InputError
from diffusion.files import read_json

STORAGE = "RAY_DDPM_STORAGE"
CLUSTER_CONFIG = "RAY_DDPM_CLUSTER_CONFIG"
RAY_ADDRESS = "RAY_ADDRESS"
TRACKING_URI = "MLFLOW_TRACKING_URI"
_DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # Ray listens on every network interface, and any client can run code
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",  # its page of metrics has no password, and nothing here reads it
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # one process a group; workers act on SIGTERM themselves
    "RAY_worker_niceness": "0",  # Ray's 15 would starve trainings beside any other busy program
    "MALLOC_ARENA_MAX": "2",  # trials are threads, and glibc keeps for each thread what it has freed
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that wait by spinning take the cores of trials and other programs
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.csv and MLflow have the same data
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL can contain the server's password
}
_QUIET = {
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # as errors it logs tracebacks of what is handled here
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",  # a bar for each small file that is registered
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints even with verbose=0
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",  # of trials that fail while the sweep ends: one line says why it does
}
# Of others, which the report on an installation shows as well.
_REPORTED = (
    STORAGE,
    CLUSTER_CONFIG,
    RAY_ADDRESS,
    TRACKING_URI,
    "AWS_ENDPOINT_URL",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "PYTHONPATH",
    "XDG_CACHE_HOME",
)
_REQUESTS = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")


def set_defaults(verbose: bool) -> None:
    """Set the variables that the user has not set, and silence warnings and logs unless `verbose`.

    Call it before torch, ray and mlflow are imported.
    """
    for name, value in _DEFAULTS.items():
        # Once imported, Ray takes no notice of this variable, but its servers would. Without it, ray.init
        # makes the token mode the default in both.
        if name != "RAY_AUTH_MODE" or "ray" not in sys.modules:
            os.environ.setdefault(name, value)
    if not verbose:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        warnings.simplefilter("ignore")
        for name in ("ray", "alembic", "torch.onnx"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def temporary_defaults(verbose: bool) -> Iterator[None]:
    """Call `set_defaults`, and restore the variables, warning filters and log levels at the end."""
    variables = {name: os.environ.get(name) for name in (*_DEFAULTS, *_QUIET, *_REQUESTS)}
    loggers = [
        logging.getLogger(name)
        for name in ("ray", "ray.tune", "ray.train", "optuna", "alembic", "torch.onnx")
    ]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            set_defaults(verbose)
            yield
    finally:
        for name, value in variables.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def cluster_config() -> dict[str, Any] | None:
    """Content of RAY_DDPM_CLUSTER_CONFIG: the cluster's YAML, which `ray up` leaves on the head node as JSON.

    None elsewhere.
    """
    path = os.environ.get(CLUSTER_CONFIG)
    if not path or RAY_ADDRESS not in os.environ:
        return None
    try:
        config = read_json(Path(path), "the cluster's YAML as JSON")
    except InputError:
        return None
    return config if "provider" in config else None


def configured_storage(config: Mapping[str, Any]) -> str | None:
    """`metadata.storage` of a cluster's YAML, or None if it has none.

    Ray's schema allows any values under `metadata`, and Ray does not use them.
    """
    return _metadata(config, "storage")


def _metadata(config: Mapping[str, Any], name: str) -> str | None:
    metadata = config.get("metadata")
    value = metadata.get(name) if isinstance(metadata, dict) else None
    return str(value) if value else None


def cluster_storage() -> str | None:
    """Bucket or shared mount that outlives a cluster's machines; None without a cluster.

    It is RAY_DDPM_STORAGE, or else, on the head node, `metadata.storage` of the cluster's YAML.
    """
    return os.environ.get(STORAGE) or configured_storage(cluster_config() or {})


def configured_database(config: Mapping[str, Any]) -> str | None:
    """`metadata.mlflow_database` of a cluster's YAML, the URI of a database for MLflow, or None."""
    return _metadata(config, "mlflow_database")


def cluster_database() -> str | None:
    """Database of its own that MLflow has on the cluster whose head node this is, or None."""
    return configured_database(cluster_config() or {})


def ray_address() -> str | None:
    """RAY_ADDRESS: address of the cluster to join; None to start Ray on this machine."""
    return os.environ.get(RAY_ADDRESS) or None


def ray_token_file() -> Path | None:
    """File with Ray's token: RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token.

    None if Ray uses no file: RAY_AUTH_TOKEN holds the token, or RAY_AUTH_MODE switches tokens off.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def tracking_uri() -> str | None:
    """MLFLOW_TRACKING_URI: the MLflow server or database; None if it is not set."""
    return os.environ.get(TRACKING_URI) or None


def wants_system_metrics() -> bool:
    """Whether runs log the use of the machine: unless MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING is false."""
    return os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() not in ("false", "0")


def has_display() -> bool:
    """Whether DISPLAY or WAYLAND_DISPLAY names a display on which a browser can open."""
    return bool({"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ))


def reported_variables() -> dict[str, str]:
    """The variables that are set among those that change what runs do, without any that hold a secret."""
    names = (*_REPORTED, *_DEFAULTS, *_QUIET)
    return {name: os.environ[name] for name in names if name in os.environ}


def s3_endpoint() -> str | None:
    """AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL: address of a server that is not Amazon's; None if not set."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def s3_region() -> str | None:
    """AWS_REGION or AWS_DEFAULT_REGION: region of buckets whose URI has none; None if it is not set."""
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None


def set_mlflow_requests(timeout_seconds: int) -> None:
    """Set the timeout of MLflow's HTTP requests, without retries; MLflow reads both for every request."""
    os.environ.update(zip(_REQUESTS, ("0", str(timeout_seconds)), strict=True))


def mlflow_server_environment(uri: str) -> dict[str, str]:
    """Environment of an MLflow server; it starts no job consumers, which would outlive it.

    Args:
        uri: URI of the database. Every user of the machine could read its password in the command line.
    """
    return {
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_LOGGING_LEVEL": "ERROR",
    }


def default_output_dir() -> str:
    """Default of --output-dir: `runs`, or on a cluster a location that outlives its machines."""
    return cluster_storage() or "runs"


def cache_folder() -> Path:
    """Folder for what can be made or fetched again: ray-ddpm in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ray-ddpm"


def shared_location(directory: Path) -> str:
    """Location at which all machines see a local folder's files: the folder itself, or one in the bucket."""
    storage = cluster_storage() or ""
    return f"{storage.rstrip('/')}/{directory.name}" if "://" in storage else str(directory)
