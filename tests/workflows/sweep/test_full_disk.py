"""A sweep whose disk becomes full or read-only ends in one line and goes on once there is room."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.workflows.conftest import user_environment

ROOT = Path(__file__).parents[3]
SWEEP = (
    "--data heart --num-trials 4 --training.num-updates 2400 --training.num-evaluations 8 "
    "--metrics.num-samples 200 --metrics.num-examples 128 --network.hidden-size 16 --sampler.num-steps 5 "
    "--search.num-blocks 3 --search.hidden-size 64 --output-dir disk --name cut"
).split()


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a small file system")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def start(folder, *arguments):
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "workflows" / "tune.py"), *arguments],
            cwd=folder,
            env=user_environment() | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=output,
        )


def finish(folder, process):
    try:
        return process.wait(400), (folder / "output.txt").read_text()
    finally:
        process.kill()
        process.wait()


def remount(disk, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_sweep_ends_in_one_line_and_goes_on_when_there_is_room(disk, tmp_path, how):
    journal, filler = disk / "cut" / "journal.jsonl", disk / "filler"
    process = start(tmp_path, *SWEEP)
    deadline = time.monotonic() + 400
    while not (journal.exists() and journal.read_text().count('"evaluated"') >= 2):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
        time.sleep(0.05)
    if how == "full":
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
    else:
        remount(disk, "ro")
    status, output = finish(tmp_path, process)
    reason = "No space left on device" if how == "full" else "Read-only file system"
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert status == 1 and str(disk) in line and reason in line and "fix that location" in line
    assert "Traceback" not in output and len(output.splitlines()) < 20, output
    assert "next: python -m workflows.tune --resume --name cut --output-dir disk" in output
    filler.unlink() if how == "full" else remount(disk, "rw")
    status, output = finish(tmp_path, start(tmp_path, *"--resume --name cut --output-dir disk".split()))
    assert status == 0, output
    table = pd.read_csv(disk / "cut" / "trials.csv")
    assert len(table) == 4 and set(table["status"]) <= {"finished", "stopped"}
    events = [json.loads(event) for event in journal.read_text().splitlines()]
    ended = [event["trial_id"] for event in events if event.get("status") == "finished"]
    assert len(ended) == len(set(ended))
