"""Simulated hosts on this machine, a laptop and the machines of a cluster, made of Linux namespaces.

Each host has its own network, mounts, process ids, host name, shared memory and home folder, and sshd as its
first process. The bridge that connects them is in the laptop's network namespace, invisible to the real
machine. `ray stop` kills every Ray process that it can see, which here are those of one host.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("ip", "nsenter", "unshare", "/usr/sbin/sshd", "ssh-keygen", "rsync", "ssh", "ps")
GATEWAY = "10.200.77.1"
SHARED = "/tmp/shared"


def unsupported_reason() -> str | None:
    """Return why this machine cannot simulate hosts, or None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (Debian's iproute2, openssh-server, rsync, procps)"
    probe = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "ip", "link", "add", "br0"]
    result = subprocess.run([*probe, "type", "bridge"], capture_output=True, text=True, timeout=20)
    return None if result.returncode == 0 else f"cannot create namespaces ({result.stderr.strip()[:100]})"


def require_hosts() -> None:
    """Skip the tests where this machine cannot simulate hosts; in CI they fail, since nobody would notice."""
    if reason := unsupported_reason():
        if os.environ.get("CI", "").lower() in ("", "0", "false"):
            pytest.skip(reason)
        pytest.fail(f"{reason}: CI has to run the tests of clusters")


class Lab:
    """The hosts; a context manager that removes them afterwards.

    Args:
        machines: Addresses in 10.200.77.0/24 of the cluster's machines, by name. They start switched off.
        variables: Environment variables of every login shell.
    """

    def __init__(self, machines: Mapping[str, str], variables: Mapping[str, str] | None = None) -> None:
        self._addresses = {"laptop": GATEWAY, **machines}
        self._variables = variables or {}
        self._prefix = f"lab{os.getpid()}"
        # Not in /tmp or the home folder, since each host has its own.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-lab-", dir="/var/tmp"))
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._commands: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Lab":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        # Kill the hosts first, which also kills everything that still writes to the commands' pipes.
        for process in [*self._hosts.values(), *self._commands]:
            process.kill()
            process.wait(20)
            if process.stdout is not None:
                process.stdout.close()
        for name in self._addresses:
            subprocess.run(["ip", "netns", "del", self._net(name)], capture_output=True, timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)

    def run(
        self, host: str, command: str, timeout: float = 60, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run a shell command on a host, in the project's folder, in the environment of a login shell."""
        process = self.start(host, command)
        output = output_of(process, timeout, f"{host}: {command}")
        assert not check or process.returncode == 0, f"{host}: {command}\n{output[-6000:]}"
        return subprocess.CompletedProcess(command, process.returncode, output, "")

    def start(self, host: str, command: str) -> "subprocess.Popen[str]":
        """Start a command as `run` does, without waiting; it is killed when the lab ends."""
        inner = f"source ~/.bashrc; cd {shlex.quote(str(ROOT))}; {command}"
        process = subprocess.Popen(
            ["nsenter", "-t", str(self._first_process(host)), "-m", "-p", "-u", "-i", "-n"]
            + ["env", "-i", f"HOME={Path.home()}", "TERM=dumb", "LANG=C.UTF-8", "USER=root"]
            + [f"PATH={os.environ['PATH']}", "bash", "-c", inner],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._commands.append(process)
        return process

    def processes(self, host: str, name: str) -> list[int]:
        """Return the ids, in the host's namespace, of its processes whose command line contains a text."""
        output = self.run(host, "ps -eo pid=,args= --width 400").stdout
        processes = [line.split(None, 1) for line in output.splitlines()]
        return [int(pid) for pid, arguments in processes if name in arguments and "ps -eo" not in arguments]

    def power_off(self, host: str) -> None:
        """Kill a host with everything that runs on it; does nothing if it is off."""
        if (process := self._hosts.pop(host, None)) is not None:
            process.kill()
            process.wait(20)

    def power_on(self, host: str) -> None:
        """Start a host, with its earlier home folder if it had one; does nothing if it is on."""
        if host in self._hosts:
            return
        net = self._net(host)
        self._hosts[host] = subprocess.Popen(
            ["ip", "netns", "exec", net, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
            + ["--kill-child", "bash", str(Path(__file__).parent / "host.sh"), host]
            + [str(self.folder / host), str(self.folder / "shared"), *self._paths_to_keep()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda: self._listens(host), 20, f"sshd on {host}")

    def _make(self) -> None:
        (self.folder / "shared").mkdir()
        key = self.folder / "key"
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        for name, address in self._addresses.items():
            self._create_files(name, key)
            _run("ip", "netns", "add", self._net(name))
            _run("ip", "-n", self._net(name), "link", "set", "lo", "up")
            if name == "laptop":
                _run("ip", "-n", self._net(name), "link", "add", "br0", "type", "bridge")
                _run("ip", "-n", self._net(name), "addr", "add", f"{address}/24", "dev", "br0")
                _run("ip", "-n", self._net(name), "link", "set", "br0", "up")
            else:
                self._connect(name, address)
        self.power_on("laptop")

    def _connect(self, name: str, address: str) -> None:
        net, laptop, cable = self._net(name), self._net("laptop"), f"v-{name}"
        _run(*f"ip -n {laptop} link add {cable} type veth peer name eth0 netns {net}".split())
        _run(*f"ip -n {laptop} link set {cable} master br0 up".split())
        _run(*f"ip -n {net} addr add {address}/24 dev eth0".split())
        _run(*f"ip -n {net} link set eth0 up".split())
        _run(*f"ip -n {net} route add default via {GATEWAY}".split())

    def _create_files(self, name: str, key: Path) -> None:
        folder = self.folder / name
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True)
        (folder / "tmp").mkdir()
        (folder / "tmp").chmod(0o1777)
        shutil.copy(f"{key}.pub", home / ".ssh" / "authorized_keys")
        shutil.copy(key, home / ".ssh" / "id_ed25519")
        names = "".join(f"{address} {host}\n" for host, address in self._addresses.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (home / ".bashrc").write_text(
            f"export PATH={sys.prefix}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
            f"export RAY_DDPM_VENV={sys.prefix} PYTHONDONTWRITEBYTECODE=1\n"
            + "".join(f"export {name}={shlex.quote(value)}\n" for name, value in self._variables.items())
        )
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        (folder / "sshd_config").write_text(
            f"HostKey {folder / 'host_key'}\nPermitRootLogin yes\nUsePAM no\nStrictModes no\nPidFile none\n"
        )

    def _paths_to_keep(self) -> list[str]:
        """Return the paths of Python, the packages and the project that a host's own mounts would hide."""
        paths = dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)])
        hidden = ("/tmp", str(Path.home()))
        return [path for path in paths if any(Path(path).is_relative_to(each) for each in hidden)]

    def _net(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def _first_process(self, host: str) -> int:
        pid = self._hosts[host].pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _listens(self, host: str) -> bool:
        assert self._hosts[host].poll() is None, f"{host} did not start"
        result = subprocess.run(
            ["ip", "netns", "exec", self._net(host), "ss", "-tln"], capture_output=True, text=True, timeout=20
        )
        return ":22 " in result.stdout


class Patience:
    """A time limit for what takes as many times longer as there are processes for each of the cores.

    Args:
        seconds: time that it may take on a machine that does nothing else.
    """

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds, self._slowdown = time.monotonic(), seconds, 1.0

    @property
    def is_over(self) -> bool:
        """Whether more time has passed, at the highest load so far."""
        self._slowdown = max(self._slowdown, os.getloadavg()[0] / (os.cpu_count() or 1))
        return time.monotonic() > self._started + self._seconds * self._slowdown


def wait_for(condition: Callable[[], bool], seconds: float, description: str) -> None:
    """Wait until a condition holds, or fail with a description of it; `seconds` as for `Patience`."""
    patience = Patience(seconds)
    while not condition():
        assert not patience.is_over, f"{description}: not within {seconds:.0f} s"
        time.sleep(0.5)


def output_of(process: "subprocess.Popen[str]", seconds: float, description: str) -> str:
    """What a process has printed when it ends; it is killed, and the test fails, if it takes longer."""
    patience = Patience(seconds)
    while True:
        try:
            return process.communicate(timeout=1.0)[0]
        except subprocess.TimeoutExpired:
            if patience.is_over:
                break
    process.kill()
    try:
        output, _ = process.communicate(timeout=5.0)
    except subprocess.TimeoutExpired as error:  # its children have its output open, and end with the lab
        output = (error.output or b"").decode(errors="replace")
    raise AssertionError(f"{description}: not done in {seconds:.0f} s\n{output[-4000:]}")


def mlflow_runs(lab: Lab, host: str) -> dict[str, list[str]]:
    """Return the statuses of all MLflow runs by name, as seen from a host with MLflow on port 5000."""
    program = "import json, mlflow; from collections import defaultdict as d; runs = d(list)\n"
    program += 'client = mlflow.MlflowClient("http://127.0.0.1:5000")\n'
    program += "ids = [each.experiment_id for each in client.search_experiments()]\n"
    program += "for run in client.search_runs(ids): runs[run.info.run_name].append(run.info.status)\n"
    program += "print(json.dumps(runs))"
    runs: dict[str, list[str]] = json.loads(lab.run(host, f"python -c '{program}'").stdout.splitlines()[-1])
    return runs


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert result.returncode == 0, f"{shlex.join(command)}: {result.stderr}"
