"""A real SLURM on this machine, in a folder of its own: slurmctld, several slurmd and munged, of Debian's packages."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "unshare")
GPUS = 8  # of a node: files that look like devices; nothing in a test opens them

SLURM_CONF = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SwitchType=switch/none
GresTypes=gpu
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
KillWait=3
MinJobAge=600
FirstJobId={first_job}
JobRequeue=1
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=8000 Gres=gpu:{gpus}\n"  # noqa: E501
# A large cluster on paper: "large" tells whether a job would start, "closed" keeps jobs in the queue.
LARGE = """
NodeName=large[1-32] NodeAddr=127.0.0.1 Port={port} CPUs=128 Boards=1 SocketsPerBoard=2 CoresPerSocket=64 ThreadsPerCore=1 RealMemory=2000000 Gres=gpu:{gpus} State=CLOUD
PartitionName=large Nodes=large[1-32] MaxTime=10080 State=UP
PartitionName=closed Nodes=large[1-32] MaxTime=10080 State=DOWN
"""  # noqa: E501
GRES_CONF = "NodeName=node[1-{nodes}] Name=gpu File={folder}/nvidia[0-{last}] Flags=no_gpu_env\n"


def require_slurm() -> None:
    """Fail where SLURM cannot be started: these tests are part of `make test`."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None] + (["root"] if os.geteuid() else [])
    if missing:
        pytest.fail(f"SLURM cannot be started, {', '.join(missing)} missing: run tools/debian.sh as root")


class Cluster:
    """A context manager. Everything that it starts is recorded by process number and stopped at the end.

    Args:
        folder: for keys, state, spools and logs.
        nodes: number of slurmd, called node1, node2 ...
        mounts: by node, a command that changes its view of the file system.
    """

    def __init__(self, folder: Path, nodes: int = 2, mounts: dict[str, str] | None = None) -> None:
        self.folder, self.mounts = folder, mounts or {}
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
        }
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            munge = [f"--{name}={self.folder}/munge/{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
            key = f"--key-file={self.folder}/munge/key"
            self._start("munged", ["munged", "--force", "--foreground", key, *munge])
            wait_for(lambda: (self.folder / "munge" / "socket").exists(), "munged's socket")
            self._start("slurmctld", ["slurmctld", "-D"])
            for name in self.names:
                self.start_node(name)
            wait_for(
                lambda: (
                    self.command("sinfo", "-h", "-N", "-p", "tests", "-o", "%T").split() == ["idle"] * len(self.names)
                ),
                "idle nodes",
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._processes:
            subprocess.run(["scancel", "--user=root"], env=self.environment, capture_output=True, timeout=20)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self._squeue().stdout.strip():
                time.sleep(0.2)
        for name in reversed(list(self._processes)):
            self.stop(name)

    def _write_files(self) -> None:
        for name in ("munge", "state", *(f"spool/{node}" for node in self.names)):
            (self.folder / name).mkdir(parents=True, mode=0o700)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host, ports = socket.gethostname().split(".")[0], free_ports(len(self.names) + 2)
        # A job's number decides the port of its rendezvous; clusters on one machine must not meet there.
        first_job = random.SystemRandom().randrange(1, 60000)
        text = SLURM_CONF.format(host=host, port=ports[0], folder=self.folder, first_job=first_job)
        for name, port in zip(self.names, ports[1:-1], strict=True):
            text += NODE.format(name=name, host=host, port=port, gpus=GPUS)
        text += f"PartitionName=tests Nodes={','.join(self.names)} Default=YES MaxTime=2880 State=UP\n"
        text += LARGE.format(port=ports[-1], gpus=GPUS)
        (self.folder / "slurm.conf").write_text(text)
        for number in range(GPUS):
            os.mknod(self.folder / f"nvidia{number}", 0o600 | 0o020000, os.makedev(1, 3))
        gres = GRES_CONF.format(nodes=len(self.names), folder=self.folder, last=GPUS - 1)
        (self.folder / "gres.conf").write_text(gres)
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {name}\n" for name in self.names)
        (self.folder / "hosts").write_text(hosts)

    def _start(self, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.out").open("ab") as output:
            self._processes[name] = subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def start_node(self, name: str) -> None:
        """Start a slurmd that knows the names of all nodes."""
        mounts = f"mount --bind {self.folder}/hosts /etc/hosts; {self.mounts.get(name, ':')}"
        self._start(name, ["unshare", "-m", "bash", "-ec", f"{mounts}; exec slurmd -D -N {name}"])

    def kill_node(self, name: str, job: int) -> None:
        """Let a node die, with all that a job has on it."""
        self.stop(name, signal.SIGKILL)
        self.kill_processes(SLURMD_NODENAME=name, SLURM_JOB_ID=str(job))
        self.command("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def kill_processes(self, **variables: str) -> int:
        """Kill the processes of this cluster that have these variables, and return how many there were."""
        wanted = {"SLURM_CONF": self.environment["SLURM_CONF"], **variables}
        killed = 0
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted.items() <= process.environ().items():
                    process.kill()
                    killed += 1
        return killed

    def stop(self, name: str, number: int = signal.SIGTERM) -> None:
        """Stop one of the daemons."""
        process = self._processes.pop(name)
        process.send_signal(number)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    # --- what a user does ---------------------------------------------------------------------------------------------

    def command(self, *words: str) -> str:
        """Run one of SLURM's commands and return its output."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: str, cwd: Path, variables: dict[str, str] | None = None) -> int:
        """Submit a job from a folder and return its number."""
        environment = {**self.environment, **(variables or {})}
        command = ["sbatch", "--parsable", *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """Return what slurmctld knows of a job."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.command("scontrol", "show", "job", "-o", str(number))))

    def preempt(self, number: int) -> None:
        """Do to a job what SLURM does before its time ends."""
        self.command("scancel", "--batch", "--signal=USR1", str(number))

    def wait(self, number: int | str, timeout: float) -> dict[str, str]:
        """Wait for the end of a job and return what slurmctld knows of it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.job(number)["JobState"] in ended, f"the end of job {number}", timeout)
        return self.job(number)

    def _squeue(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["squeue", "-h"], env=self.environment, capture_output=True, text=True, timeout=20)


def wait_for(condition: Callable[[], bool], what: str, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not there after {timeout} s"
        time.sleep(0.1)


def free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on, below those that the kernel gives to clients."""
    sockets = []
    ports: list[int] = []
    port = 10000 + os.getpid() % 9000
    while len(ports) < number:
        one = socket.socket()
        try:
            one.bind(("127.0.0.1", port))
            ports.append(port)
            sockets.append(one)
        except OSError:
            one.close()
        port += 1
    for one in sockets:
        one.close()
    return ports
