"""A SLURM of our own on this host: munge, slurmctld and two slurmd, in a temporary folder.

    with Cluster() as cluster:
        job = cluster.submit([SCRIPT, "config.yaml"], ["--time=5"], cwd=folder)
        cluster.until(job, "RUNNING")

Key, sockets, ports, configuration: all are its own, and what it started is ended by process id when it is left. It
needs Debian's packages `slurm-wlm` and `munge`; neither cgroups nor root. Both nodes are this host, under names that no
resolver knows. A node has 8 processors whatever the host has; the second one believes that it has two GPUs.
"""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

NODES = ("r1n03", "r1n04")
ENDED = ("CANCELLED", "COMPLETED", "FAILED", "NODE_FAIL", "PREEMPTED", "TIMEOUT")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # a login's, without an environment's python

# A requeued job waits for cred_expire; less than 5 means 120 s, the default. The partitions are ways of being
# pre-empted by a job in `urgent`.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1
KillWait=10
SlurmdTimeout=15
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=requeue Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cancel Nodes=ALL PriorityTier=1 PreemptMode=CANCEL
PartitionName=grace Nodes=ALL PriorityTier=1 PreemptMode=CANCEL GraceTime=30
PartitionName=urgent Nodes=ALL PriorityTier=10
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [program for program in PROGRAMS if shutil.which(program, path=SEARCH) is None]


class Cluster:
    """Running while entered."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def __enter__(self) -> "Cluster":
        with ExitStack() as stack:
            # not a test's own folder: the path of a socket has at most 107 characters
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-")))
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        folder = self.folder
        folder.chmod(0o711)  # munged refuses a socket that others cannot reach
        (folder / "state").mkdir()
        configuration = folder / "slurm.conf"
        configuration.write_text(CONFIGURATION.format(
            host=socket.gethostname().split(".")[0], ports=free_ports(3), user=getpass.getuser(), folder=folder,
            nodes=NODES,
        ))  # fmt: skip
        # SLURM wants devices; it hands their numbers out and leaves them alone
        gpus = [f"NodeName={NODES[1]} Name=gpu File=/dev/{device}\n" for device in ("null", "zero")]
        (folder / "gres.conf").write_text("".join(gpus))
        ours = ("SLURM", "SBATCH", "SRUN", "VENV", "MAX_RESTARTS")  # make exports VENV where it is given to it
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self.env |= {"PATH": SEARCH, "SLURM_CONF": str(configuration), "USER": getpass.getuser()}

        key = folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        self._daemon(stack, "munged", "--foreground", f"--key-file={key}", f"--socket={folder}/munge.socket",
                     f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log",
                     f"--seed-file={folder}/munged.seed")  # fmt: skip
        wait_for(lambda: (folder / "munge.socket").exists(), "munged's socket", 10, self.logs)
        self._daemon(stack, "slurmctld", "-D", "-c", "-f", str(configuration))
        for node in NODES:
            self._daemon(stack, "slurmd", "-D", "-N", node, "-f", str(configuration))
        stack.callback(self.cancel_all)  # called first: without slurmd nobody would end the jobs' processes
        wait_for(
            lambda: self.run("sinfo", "-h", "-N", "-p", "urgent", "-o", "%T").split() == ["idle", "idle"],
            "two idle nodes", 30, self.logs,
        )  # fmt: skip

    def _daemon(self, stack: ExitStack, *command: str) -> None:
        with open(self.folder / f"{command[0]}.out", "ab") as output:
            daemon = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        stack.callback(end, daemon)

    def cancel_all(self) -> None:
        """Ends every job, also one that puts itself back into the queue."""

        def gone() -> bool:
            jobs = self.run("squeue", "-h", "-o", "%A").split()
            return not jobs or self.run("scancel", *jobs) is None

        wait_for(gone, "the end of all jobs", 60, self.logs)

    def run(self, *command: str) -> str:
        """What a command of SLURM prints, errors included; it may fail, as while the controller starts."""
        done = subprocess.run(
            command, env=self.env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=60,
        )  # fmt: skip
        return done.stdout

    def submit(self, command: Sequence[object], options: Sequence[str], *, cwd: Path, **env: str | None) -> str:
        """The number of a new batch job; its log is `cwd`/log-NUMBER. A variable that is None is not set."""
        environment = {k: v for k, v in (self.env | env).items() if v is not None}
        done = subprocess.run(
            ["sbatch", "--parsable", "--output=log-%j", *options, *map(str, command)],
            cwd=cwd, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def finish(self, text: str, options: Sequence[str], *, cwd: Path, **env: str | None) -> None:
        """Runs a batch script of one line to its end, which must be a good one; its log lies as with `submit`."""
        self.until(self.submit([f"--wrap={text}"], options, cwd=cwd, **env), "COMPLETED")

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says of a job, by name; {} once the job is forgotten."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, number: str, *states: str, timeout: float = 60.0) -> dict[str, str]:
        """Waits until the job is in one of the states; gives what `job` does."""

        def there() -> bool:
            state = self.job(number).get("JobState")
            assert state in states or state not in ENDED, f"job {number} is {state}\n{self.explain(number)}"
            return state in states

        what = f"job {number} to be {' or '.join(states)}"
        wait_for(there, what, timeout, lambda: self.explain(number))
        return self.job(number)

    def explain(self, number: str) -> str:
        """What SLURM knows of a job, and the end of what it printed."""
        job = self.job(number)
        log = Path(job.get("StdOut", "")).read_text(errors="replace") if "StdOut" in job else ""
        return f"{job}\n{log[-3000:]}"

    def logs(self) -> str:
        """The ends of the daemons' logs, for a failure's message."""
        files = sorted([*self.folder.glob("*.out"), *self.folder.glob("*.log")])
        return "\n".join(f"--- {file.name} ---\n{file.read_text(errors='replace')[-500:]}" for file in files)


def wait_for(
    condition: Callable[[], object], what: str, timeout: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Looks every tenth of a second; an AssertionError with the explanation when the time is up."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"waited {timeout:g} s for {what}\n{explain()}"
        time.sleep(0.1)


def end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
