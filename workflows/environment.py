"""Settings that Ray and MLflow read when they are imported, and how loud they are."""

import logging
import os
import warnings

_DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # Ray's ports listen on every interface, and who connects can run code
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # trials.csv and MLflow hold what they would write
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print the server's password
}


def set_defaults(verbose: bool) -> None:
    """Set what the user has not set, and hush warnings and logs unless `verbose`.

    Call it before ray and mlflow are imported.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if not verbose:
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one prints even when told not to
        warnings.simplefilter("ignore")
        for name in ("ray", "alembic", "torch.onnx"):
            logging.getLogger(name).setLevel(logging.ERROR)
