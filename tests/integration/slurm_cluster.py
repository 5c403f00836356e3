"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd with their own folder and ports.

Another Slurm of the machine is not touched.
"""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

_SBIN = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
NODES = ("127.0.0.1", "127.0.0.2")  # names that are addresses: MASTER_ADDR is a node's name
CONFIG = """
ClusterName=janus-sft-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=10
KillWait=30
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Return why no cluster can be started here; None if it can."""
    missing = [name for name in ("slurmctld", "slurmd", "munged") if shutil.which(name, path=_SBIN) is None]
    if missing:
        return f"{', '.join(missing)}: not installed (Debian: apt-get install slurm-wlm munge)"
    return None if os.geteuid() == 0 else "slurmctld and slurmd are started as root, and this is another user"


def wait_until(condition: Callable[[], object], what: str, seconds: float = 240) -> None:
    """Wait until `condition` is true; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.1)


class Cluster:
    """The running cluster and its commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf"), "SLURM_TIME_FORMAT": "standard"}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str | Path) -> None:
        """Start a daemon in the foreground of its own session, so that it is a child of ours."""
        program, *arguments = command
        with (self.folder / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [shutil.which(str(program), path=_SBIN) or program, *arguments],
                env=self.environment, stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip

    def start_node(self, number: int) -> None:
        """Start a node, and wait until Slurm uses it."""
        self.start(NODES[number], "slurmd", "-D", "-N", NODES[number])
        wait_until(lambda: self.run("sinfo", "-hN", "-n", NODES[number], "-o", "%T") == "idle", f"{NODES[number]} idle")

    def kill_node(self, number: int) -> None:
        """Kill its slurmd without notice, like a failing machine."""
        self._daemons[NODES[number]].kill()
        self._daemons[NODES[number]].wait()

    def stop(self) -> None:
        """End jobs and daemons in the order of their dependencies, then remaining processes of jobs."""
        with suppress(AssertionError, OSError):
            self.run("scancel", "--user=root")
            self.run("scancel", "--user=root", "--signal=KILL", "--full")
            wait_until(lambda: not self.run("squeue", "-h"), "jobs gone", 20)
        for name in reversed(list(self._daemons)):
            self._daemons[name].terminate()
            try:
                self._daemons[name].wait(10)
            except subprocess.TimeoutExpired:
                self._daemons[name].kill()
                self._daemons[name].wait()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def run(self, *command: str) -> str:
        """Return the output of a Slurm command; empty if it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout.strip()

    def state(self, job: str) -> str:
        """Return the job's state (RUNNING, PENDING, COMPLETED, ...) and its reason, such as `PENDING BeginTime`."""
        shown = self.run("scontrol", "show", "job", "--oneliner", job)
        words = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        return f"{words.get('JobState', 'GONE')} {words['Reason']}" if "Reason" in words else "GONE"

    def wait_for(self, job: str, state: str, seconds: float = 240) -> None:
        """Wait until the state of the job starts with `state`."""
        wait_until(lambda: self.state(job).startswith(state), f"{job} {state}", seconds)

    def release(self, job: str) -> None:
        """Let a requeued job start soon: Slurm delays it by two minutes.

        Not immediately: a job that starts in the second of its requeue is mistaken for the one that was to end.
        """
        self.wait_for(job, "PENDING")
        self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")

    def processes(self, job: str | None = None, program: str = "") -> list[psutil.Process]:
        """Return the processes of this cluster's jobs, or of one (an id or `ARRAY_TASK`), that run `program`."""
        processes = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"] and process.pid != os.getpid()
                task = f"{environment.get('SLURM_ARRAY_JOB_ID')}_{environment.get('SLURM_ARRAY_TASK_ID')}"
                of_job = job in (None, environment.get("SLURM_JOB_ID"), task)
                if ours and of_job and any(word.endswith(program) for word in process.cmdline()[:3]):
                    processes.append(process)
        return processes


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Run a cluster inside the block."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        ports = [listener.getsockname()[1] for listener in sockets]
    folder = Path(tempfile.mkdtemp(prefix="janus-sft-slurm-"))
    host = socket.gethostname().partition(".")[0]
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=ports, nodes=NODES))
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ours = Cluster(folder)
    try:
        files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
        ours.start("munged", "munged", "--foreground", "--force", *options)
        wait_until((folder / "munge.socket").exists, "munged listens")
        ours.start("slurmctld", "slurmctld", "-D")
        wait_until(lambda: "is UP" in ours.run("scontrol", "ping"), "slurmctld answers")
        for number in range(len(NODES)):
            ours.start_node(number)
        yield ours
    except BaseException:
        for log in ("munge.log", "slurmctld.log", *(f"slurmd-{node}.log" for node in NODES)):
            with suppress(OSError):
                print(f"--- {log}\n{(folder / log).read_text()[-3000:]}")
        raise
    finally:
        ours.stop()
        shutil.rmtree(folder, ignore_errors=True)
