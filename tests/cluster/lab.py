"""Hosts on this machine: a laptop and the machines of a cluster, made of namespaces.

Each has its own network, mounts, processes, name and shared memory, a home folder of its own, and an sshd
as its first process. Their bridge lies in the laptop's network, so this machine's own sees nothing of it.
Ray's commands end every Ray process that they can see: here they see those of one host alone.
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

ROOT = Path(__file__).parents[2]
TOOLS = ("ip", "nsenter", "unshare", "/usr/sbin/sshd", "ssh-keygen", "rsync", "ssh", "ps")
GATEWAY = "10.200.77.1"
SHARED = "/tmp/shared"


def why_not() -> str | None:
    """Why there can be no hosts here, None where there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs {', '.join(missing)} (Debian's iproute2, openssh-server, rsync, procps)"
    probe = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "ip", "link", "add", "br0"]
    tried = subprocess.run([*probe, "type", "bridge"], capture_output=True, text=True, timeout=20)
    return None if tried.returncode == 0 else f"may not make namespaces ({tried.stderr.strip()[:100]})"


class Lab:
    """The hosts; a context manager that leaves nothing behind.

    Args:
        machines: addresses in 10.200.77.0/24 by name, of the cluster's machines. They are off at first.
        variables: environment of every login.
    """

    def __init__(self, machines: Mapping[str, str], variables: Mapping[str, str] | None = None) -> None:
        self._addresses = {"laptop": GATEWAY, **machines}
        self._variables = variables or {}
        self._prefix = f"lab{os.getpid()}"
        # Neither in /tmp nor in the home folder, which each host has of its own.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-ddpm-lab-", dir="/var/tmp"))
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}
        self._others: list[subprocess.Popen[str]] = []

    def __enter__(self) -> "Lab":
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        # The hosts first, and with them whatever still writes to the others' pipes.
        for process in [*self._hosts.values(), *self._others]:
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
        """Run a shell command on a host, in the project's folder, with the environment of its logins."""
        process = self.start(host, command)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate(timeout=20)
            raise AssertionError(f"{host}: {command}: not done in {timeout} s\n{said[-4000:]}") from None
        assert not check or process.returncode == 0, f"{host}: {command}\n{said[-6000:]}"
        return subprocess.CompletedProcess(command, process.returncode, said, "")

    def start(self, host: str, command: str) -> "subprocess.Popen[str]":
        """The same without waiting; what still runs at the end is ended."""
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
        self._others.append(process)
        return process

    def processes(self, host: str, name: str) -> list[int]:
        """Ids, as the host knows them, of its processes whose title holds a text."""
        said = self.run(host, "ps -eo pid=,args= --width 400").stdout
        found = [line.split(None, 1) for line in said.splitlines()]
        return [int(number) for number, title in found if name in title and "ps -eo" not in title]

    def power_off(self, host: str) -> None:
        """At once, with everything that runs there; nothing where it is off."""
        if (process := self._hosts.pop(host, None)) is not None:
            process.kill()
            process.wait(20)

    def power_on(self, host: str) -> None:
        """Start it, with the home folder that it had; nothing where it is on."""
        if host in self._hosts:
            return
        net = self._net(host)
        self._hosts[host] = subprocess.Popen(
            ["ip", "netns", "exec", net, "unshare", "--mount", "--pid", "--uts", "--ipc", "--fork"]
            + ["--kill-child", "bash", str(Path(__file__).parent / "host.sh"), host]
            + [str(self.folder / host), str(self.folder / "shared"), *self._kept()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        wait_for(lambda: self._listens(host), 20, f"sshd on {host}")

    def _make(self) -> None:
        (self.folder / "shared").mkdir()
        key = self.folder / "key"
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        for name, address in self._addresses.items():
            self._furnish(name, key)
            _do("ip", "netns", "add", self._net(name))
            _do("ip", "-n", self._net(name), "link", "set", "lo", "up")
            if name == "laptop":
                _do("ip", "-n", self._net(name), "link", "add", "br0", "type", "bridge")
                _do("ip", "-n", self._net(name), "addr", "add", f"{address}/24", "dev", "br0")
                _do("ip", "-n", self._net(name), "link", "set", "br0", "up")
            else:
                self._connect(name, address)
        self.power_on("laptop")

    def _connect(self, name: str, address: str) -> None:
        net, laptop, cable = self._net(name), self._net("laptop"), f"v-{name}"
        _do(*f"ip -n {laptop} link add {cable} type veth peer name eth0 netns {net}".split())
        _do(*f"ip -n {laptop} link set {cable} master br0 up".split())
        _do(*f"ip -n {net} addr add {address}/24 dev eth0".split())
        _do(*f"ip -n {net} link set eth0 up".split())
        _do(*f"ip -n {net} route add default via {GATEWAY}".split())

    def _furnish(self, name: str, key: Path) -> None:
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
        _do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
        (folder / "sshd_config").write_text(
            f"HostKey {folder / 'host_key'}\nPermitRootLogin yes\nUsePAM no\nStrictModes no\nPidFile none\n"
        )

    def _kept(self) -> list[str]:
        """Python, the packages and the project, where a host's own folders would cover them."""
        paths = dict.fromkeys([sys.base_prefix, sys.prefix, str(ROOT)])
        covered = ("/tmp", str(Path.home()))
        return [path for path in paths if any(Path(path).is_relative_to(each) for each in covered)]

    def _net(self, host: str) -> str:
        return f"{self._prefix}-{host}"

    def _first_process(self, host: str) -> int:
        number = self._hosts[host].pid
        return int(Path(f"/proc/{number}/task/{number}/children").read_text().split()[0])

    def _listens(self, host: str) -> bool:
        assert self._hosts[host].poll() is None, f"{host} did not start"
        said = subprocess.run(
            ["ip", "netns", "exec", self._net(host), "ss", "-tln"], capture_output=True, text=True, timeout=20
        )
        return ":22 " in said.stdout


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait until a condition holds, or fail with what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.5)


def mlflow_runs(lab: Lab, host: str) -> dict[str, list[str]]:
    """Statuses of the cluster's runs by name, as a host sees them whose port 5000 is MLflow's."""
    program = "import json, mlflow; from collections import defaultdict as d; found = d(list)\n"
    program += 'client = mlflow.MlflowClient("http://127.0.0.1:5000")\n'
    program += "ids = [each.experiment_id for each in client.search_experiments()]\n"
    program += "for run in client.search_runs(ids): found[run.info.run_name].append(run.info.status)\n"
    program += "print(json.dumps(found))"
    found: dict[str, list[str]] = json.loads(lab.run(host, f"python -c '{program}'").stdout.splitlines()[-1])
    return found


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{shlex.join(command)}: {done.stderr}"
