"""Ray's settings, and a bucket's server on this machine."""

import itertools
import logging

import pytest

from workflows.environment import set_defaults

set_defaults(verbose=True)  # Ray reads whether it wants a token when it is imported, not later

import ray  # noqa: E402


@pytest.fixture(scope="session")
def ray_here():
    """Ray in this process, with two processors of this machine."""
    ray.init("local", num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


_numbers = itertools.count()


@pytest.fixture(scope="session")
def _s3_server():
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it tells of every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(_s3_server, monkeypatch):
    """Name of a fresh bucket, on a server that the usual variables name."""
    from pyarrow import fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    monkeypatch.setenv("AWS_ENDPOINT_URL", _s3_server)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    bucket = f"bucket-{next(_numbers)}"
    fs.S3FileSystem(endpoint_override=_s3_server, region="us-east-1", allow_bucket_creation=True).create_dir(
        bucket
    )
    return bucket
