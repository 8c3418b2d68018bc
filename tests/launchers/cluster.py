"""Two hosts in namespaces of this machine: network, UTS, mount and PID each, joined by a cable, with sshd and Slurm.

The file system is shared, as on a cluster. Killing a host's first process kills all of it, as a power cut does.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
PROGRAMS = ("sbatch", "pdsh", "/usr/sbin/sshd", "ssh", "ip", "pkill")  # which `make test-cluster` installs
NAMES = ("h1", "h2")
DEADLINE = 300  # seconds, which end a hang on a busy machine
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # of a rank: each host takes all cores for its own


def why_impossible() -> str | None:
    """What keeps this machine from having two hosts; None where nothing does."""
    if os.geteuid():
        return "two hosts on one machine need root"
    if missing := [program for program in PROGRAMS if not shutil.which(program)]:
        return f"two hosts on one machine need {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True,
        text=True,
    )
    return f"this machine cannot make namespaces ({tried.stderr.strip()})" if tried.returncode else None


class ThisHost:
    """The host of the tests, where runs on a single host are started."""

    def __init__(self, name: str = "here", **variables: str) -> None:
        self.name = name
        self.variables = variables

    def words(self, *command: str) -> list[str]:
        """`command` as words that run it on this host."""
        return [*command]

    def spawn(self, output: Path, *command: str, **variables: str) -> subprocess.Popen:
        """Start `command` on this host, in a session of its own, with its output in a file."""
        environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **self.variables, **variables}
        environment.pop("CI", None)
        with open(output, "w") as file:
            return subprocess.Popen(
                self.words("env", f"--chdir={ROOT}", *command), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True, env=environment,
            )  # fmt: skip


class Host(ThisHost):
    """One of the two."""

    def __init__(self, cluster: Cluster, name: str):
        super().__init__(name, **ONE_THREAD)
        self.network = f"{cluster.name}-{name}"
        self.folder = cluster.folder
        self.init = 0  # process id of its first process
        self._unshare: subprocess.Popen | None = None

    def start(self) -> None:
        files = self.folder
        script = (
            f"hostname {self.name}; mount --bind {files}/hosts /etc/hosts; "
            f"mount --bind {files}/ssh_config /etc/ssh/ssh_config; "
            "mount -t tmpfs none /run; mkdir /run/sshd; "  # Slurm's sockets are there
            f"exec /usr/sbin/sshd -D -e -f {files}/sshd_config"
        )
        with open(files / f"sshd-{self.name}", "a") as log:
            # setpriv: whatever becomes of the tests, their hosts end with them.
            self._unshare = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--net=/run/netns/{self.network}",
                 "unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                 "bash", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        wait_for(lambda: children.read_text().split(), f"{self.name} does not start")
        self.init = int(children.read_text().split()[0])
        wait_for(lambda: self.run("ssh", self.name, "true").returncode == 0, f"sshd of {self.name} does not answer")

    def words(self, *command: str) -> list[str]:
        return ["nsenter", "-t", str(self.init), "-n", "-u", "-m", "-p", f"--wdns={os.getcwd()}", "--", *command]

    def run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.words(*command), capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=DEADLINE,
            env={**os.environ, **ONE_THREAD},
        )  # fmt: skip

    def cut_power(self) -> None:
        """End it without a word to the network: the cable is pulled first."""
        self.run("ip", "link", "set", "eth0", "down")
        self.kill()

    def kill(self) -> None:
        if self._unshare:
            os.kill(self.init, signal.SIGKILL)
            self._unshare.wait()
            self._unshare = None

    @property
    def is_up(self) -> bool:
        return self._unshare is not None


class Cluster:
    """Both hosts."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.name = f"mm{os.getpid()}"
        self.hosts = {name: Host(self, name) for name in NAMES}
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        self._write_ssh_files()
        first, second = (self.hosts[name].network for name in NAMES)
        for network in (first, second):
            _ip("netns", "add", network)
        _ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for number, name in enumerate(NAMES, start=1):
            inside = ("-n", self.hosts[name].network)
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
            self.plug_in(name)
            self.hosts[name].start()

    def plug_in(self, name: str) -> None:
        _ip("-n", self.hosts[name].network, "link", "set", "eth0", "up")

    def restore(self) -> None:
        """Bring back what a test has taken down."""
        for name, host in self.hosts.items():
            if not host.is_up:
                self.plug_in(name)
                host.start()
                if self._daemons:
                    self._daemon(name, "slurmd", "-D", "-N", name)

    def stop(self) -> None:
        for daemon in self._daemons:
            daemon.kill()
            daemon.wait()
        for host in self.hosts.values():
            host.kill()
            subprocess.run(["ip", "netns", "delete", host.network], check=False, stderr=subprocess.DEVNULL)

    def _write_ssh_files(self) -> None:
        files = self.folder
        for key in ("host_key", "id"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(files / key)], check=True)
        (files / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 h1\n10.77.0.2 h2\n")
        (files / "ssh_config").write_text(
            f"Host *\nIdentityFile {files}/id\nIdentitiesOnly yes\nUserKnownHostsFile /dev/null\n"
            "StrictHostKeyChecking no\nLogLevel ERROR\n"
        )
        (files / "sshd_config").write_text(
            f"HostKey {files}/host_key\nAuthorizedKeysFile {files}/id.pub\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPidFile none\nMaxStartups 100\n"
        )

    # --- Slurm ------------------------------------------------------------------------------------------------------

    def start_slurm(self) -> None:
        """Without systemd, munge and cgroups; jobs come back within seconds when they are queued again."""
        files = self.folder / "slurm"
        for name in ("state", "h1", "h2"):
            (files / name).mkdir(parents=True)
        (files / "slurm.key").write_bytes(os.urandom(1024))
        (files / "slurm.key").chmod(0o600)
        (files / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        settings = {
            "ClusterName": "two", "SlurmctldHost": "h1", "SlurmUser": "root", "AuthType": "auth/slurm",
            "CredType": "cred/slurm", "AuthInfo": "cred_expire=5", "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none", "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_CPU",
            "SchedulerType": "sched/builtin",
            "SchedulerParameters": "sched_interval=1,batch_sched_delay=0,sched_min_interval=0",
            "SlurmdParameters": "config_overrides", "ReturnToService": "2", "MailProg": "/bin/true", "KillWait": "5",
            "SlurmdTimeout": "20", "StateSaveLocation": f"{files}/state", "SlurmdSpoolDir": f"{files}/%n",
            "SlurmctldPidFile": f"{files}/slurmctld.pid", "SlurmdPidFile": f"{files}/slurmd-%n.pid",
            "SlurmctldLogFile": f"{files}/slurmctld.log", "SlurmdLogFile": f"{files}/slurmd-%n.log",
            "JobCompType": "jobcomp/none",
        }  # fmt: skip
        lines = [f"{key}={value}" for key, value in settings.items()]
        lines.append("NodeName=h[1-2] CPUs=8 RealMemory=4000")
        lines.append("PartitionName=all Nodes=h[1-2] Default=YES MaxTime=INFINITE State=UP")
        (files / "slurm.conf").write_text("\n".join(lines) + "\n")
        os.environ["SLURM_CONF"] = str(files / "slurm.conf")
        self._daemon("h1", "slurmctld", "-D", "-c", "-i")
        # A slurmd that finds no controller tries again much later.
        wait_for(lambda: " is UP" in self.hosts["h1"].run("scontrol", "ping").stdout, self._slurm_said)
        for name in NAMES:
            self._daemon(name, "slurmd", "-D", "-N", name)

        def idle() -> bool:
            return self.hosts["h1"].run("sinfo", "--noheader", "--format=%D %t").stdout.strip() == "2 idle"

        wait_for(idle, self._slurm_said)

    def _slurm_said(self) -> str:
        return "\n".join(f"{file.name}: {file.read_text()}" for file in (self.folder / "slurm").glob("*.out"))

    def _daemon(self, host: str, *command: str) -> None:
        with open(self.folder / "slurm" / f"{command[0]}-{host}.out", "w") as log:
            words = self.hosts[host].words(*command)
            self._daemons.append(
                subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
            )


def wait_for(condition, otherwise, seconds: float = DEADLINE) -> None:
    """Wait until `condition()` is true; AssertionError with the words `otherwise`, or that it gives, if not in time."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, otherwise() if callable(otherwise) else otherwise
        time.sleep(0.1)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
