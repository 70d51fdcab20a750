"""What a local run listens on: every port asks for the token."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# Starts Ray as a run does, with a worker, and asks each port of its processes for what others must not have.
# A gRPC port has one or more of these services; the first answer to a call of a service that it does not have
# is UNIMPLEMENTED.
CLIENT = """
import json, os, socket, time
import grpc, psutil, ray
from workflows.environment import set_defaults
set_defaults(verbose=False)
from workflows.ray_runtime.session import start_ray, stop_ray

METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetNodeStats", "ObjectManagerService/Pull", "CoreWorkerService/PushTask",
    "LogService/ListLogs", "ReporterService/GetTraceback",
)
REFUSED, UNKNOWN = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED

def grpc_answer(host, port, metadata):
    codes = []
    for method in METHODS:
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            try:
                channel.unary_unary("/ray.rpc." + method)(b"", timeout=30, metadata=metadata)
                return "answered " + method
            except grpc.RpcError as error:
                codes.append(error.code())
    if REFUSED in codes and set(codes) <= {REFUSED, UNKNOWN}:
        return "refused"
    return " ".join(str(code) for code in codes)

def http_answer(host, port):
    with socket.create_connection((host, port), 30) as connection:
        connection.settimeout(30)
        body = b"POST /get_or_create_runtime_env HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 0\\r\\n"
        connection.sendall(body + b"Connection: close\\r\\n\\r\\n")
        line = connection.recv(1000).split(b"\\r\\n")[0]
    if line.startswith(b"HTTP/1") and line.split()[1] in (b"401", b"403"):
        return "refused"
    return line.decode(errors="replace")

start_ray(verbose=False)

@ray.remote
class Worker:
    def ready(self):
        return os.getpid()

worker = Worker.remote()
ray.get(worker.ready.remote())
time.sleep(3)  # the agents open their ports a little later
session = ray._private.worker._global_node.get_session_dir_path()
own = {psutil.Process().pid, *(child.pid for child in psutil.Process().children(recursive=True))}
ports = {}
for process in psutil.process_iter():
    try:
        if process.pid in own or any(session in word for word in process.cmdline()):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    ports[connection.laddr[:2]] = process.name()
    except psutil.Error:
        continue
answers = {}
for (host, port), name in ports.items():
    host = "127.0.0.1" if host in ("::", "0.0.0.0") else host
    metadata = [("authorization", "Bearer wrong")] if port % 2 else []
    answer = grpc_answer(host, port, metadata)
    if answer != "refused":
        answer = http_answer(host, port)
    answers[f"{name} {host}:{port}"] = answer
print(json.dumps(answers))
stop_ray()
"""


@pytest.mark.slow
def test_every_port_of_a_local_run_refuses_who_has_no_token(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", CLIENT],
        cwd=ROOT,
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answers = json.loads(result.stdout.splitlines()[-1])
    assert len(answers) >= 5, answers  # GCS, raylet and its object manager, the driver, a worker
    assert set(answers.values()) == {"refused"}, answers
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
