"""`run` ends a process with the status of its main function, and without C++ destructors."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def run_script(body: str) -> subprocess.CompletedProcess[str]:
    """Run a script whose `main` has this body."""
    script = "\n".join(
        [
            "import atexit, ctypes, os, signal, sys, time",
            "from diffusion.errors import InputError",
            "from workflows.cli.process import run",
            "def main(arguments):",
            textwrap.indent(textwrap.dedent(body), "    "),
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)",  # nohup, which may run the tests, ignores it
            "run(main)",
        ]
    )
    return subprocess.run(
        [sys.executable, "-c", script, "argument"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize(
    ("body", "status", "output", "error"),
    [
        ("print(arguments); return 0", 0, "['argument']\n", ""),
        ("print('lost'); return 3", 3, "lost\n", ""),
        ("raise InputError('--data x: give a name')", 2, "", "error: --data x: give a name\n"),
        ("raise KeyboardInterrupt", 3, "", "interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", 3, "", "interrupted\n"),
        ("os.kill(os.getpid(), signal.SIGHUP); time.sleep(60)", 3, "", "interrupted\n"),
        ("sys.exit(2)", 2, "", ""),
        ("sys.exit()", 0, "", ""),
        ("sys.exit('a reason')", 1, "", "a reason\n"),
    ],
)
def test_status_and_output(body, status, output, error):
    result = run_script(body)
    assert (result.returncode, result.stdout, result.stderr) == (status, output, error)


def test_an_unexpected_exception_is_shown():
    result = run_script("raise ValueError('a bug')")
    assert result.returncode == 1 and "ValueError: a bug" in result.stderr


def test_pythons_exit_handlers_run():
    result = run_script("atexit.register(print, 'closed'); return 0")
    assert (result.returncode, result.stdout) == (0, "closed\n")


def test_cpp_destructors_do_not_run():
    # Functions given to C's exit run among the destructors of static C++ objects.
    crash = "libc = ctypes.CDLL(None); libc.__cxa_atexit(libc.abort, None, None); return 0"
    assert run_script(crash).returncode == 0
    without_run = f"import ctypes\ndef main(): {crash}\nmain()"
    assert subprocess.run([sys.executable, "-c", without_run], timeout=300).returncode != 0


@pytest.mark.parametrize(
    ("body", "status"),
    [("raise InputError('a')", 2), ("raise KeyboardInterrupt", 3)],
)
def test_the_status_is_the_same_where_nothing_can_be_printed(body, status):
    body = f"sys.stdout = sys.stderr = open('/dev/full', 'w', buffering=1)\n{body}"
    assert run_script(body).returncode == status
