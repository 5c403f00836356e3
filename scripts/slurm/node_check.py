r"""Check the nodes of a job before training starts; the batch script runs one process per node.

    srun --ntasks-per-node=1 python scripts/slurm/node_check.py \
        --recipe recipes/janus-7b/sft/full.yaml --gpus 8

Checks that code and packages are the same on all nodes, that output_dir and the cache are shared and writable, that
all GPUs are present with free memory, and that an all-reduce over all of them succeeds in time. Reads SLURM_NODEID,
SLURM_NNODES, SLURMD_NODENAME, MASTER_ADDR and MASTER_PORT. Errors are printed once, as one `error:` that names the
nodes and what to do; the exit code is then 2 on all nodes.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from torch.distributed import PrefixStore, Store, TCPStore

from train.cli import CommandLine, print_error, run_command
from train.data.cache import default_folder
from train.errors import UserError
from train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "numpy")
MIN_FREE_SHARE = 0.9
"""Share of a GPU's memory that must be free; our own CUDA context takes about 0.5 GiB."""
_GRACE = 10
"""Seconds for network file systems, and between the report of the first node and the exit of the others."""
_HINT = (
    "Set NCCL_DEBUG=INFO before submitting for details, NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to select a network."
)

Facts = dict[str, str | None]


@dataclass(frozen=True)
class Nodes:
    """The nodes of this job; this process runs on number `here`, and nodes wait at most `wait` for each other."""

    store: Store
    names: Sequence[str]
    here: int
    wait: timedelta

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Publish `value` and return the values of all nodes, in their order. Raises UserError naming missing nodes."""
        self.store.set(f"{topic}/{self.here}", json.dumps(value))
        # The others wait longer than the first node, which reports the error.
        deadline = time.monotonic() + self.wait.total_seconds() + (_GRACE if self.here else 0)
        values, missing = [], []
        for number, name in enumerate(self.names):
            try:
                self.store.wait([f"{topic}/{number}"], timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                values.append(json.loads(self.store.get(f"{topic}/{number}")))
            except RuntimeError:
                missing.append(name)
        if missing:
            raise UserError(
                f"{', '.join(missing)}: no message within {self.wait.total_seconds():.0f} s at {rendezvous()}. Is the "
                "node up, and does a firewall block that port? `--sbatch=--exclude=NODE` excludes it."
            )
        return values

    def leave(self) -> None:
        """Wait until no other node needs this one: the first has reported, and its store is no longer used."""
        self.store.set(f"leaving/{self.here}", "")
        others = range(1, len(self.names)) if self.here == 0 else [0]
        with suppress(RuntimeError):
            self.store.wait([f"leaving/{number}" for number in others], timedelta(seconds=_GRACE))


def rendezvous() -> str:
    """Return the address at which the first node listens."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def node_names(count: int) -> list[str]:
    """Return the names of the job's nodes in Slurm; without Slurm, their numbers."""
    node_list = os.environ.get("SLURM_JOB_NODELIST")
    if node_list:
        result = subprocess.run(
            ["scontrol", "show", "hostnames", node_list],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if len(result.stdout.split()) == count:
            return result.stdout.split()
    return [f"node {number}" for number in range(count)]


def code_facts() -> Facts:
    """Return the versions of everything that trains: commit, hash of train/, Python and packages."""
    git = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    try:
        commit = (
            subprocess.run(
                git, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=30
            ).stdout.strip()
            or None
        )
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    code = hashlib.sha256()
    for path in sorted((ROOT / "train").rglob("*.py")):
        code.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    facts: Facts = {"commit": commit, "train/": code.hexdigest()[:12], "python": platform.python_version()}
    for package in PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            facts[package] = None
    return facts


def describe_differences(here: Facts, first: Facts) -> str:
    """Return how this node differs from the first one; empty if it doesn't. git may be missing on a node."""
    return ", ".join(
        f"{key} {here[key] or 'is missing'} instead of {first[key] or 'none'}"
        for key in here
        if here[key] != first[key] and not (key == "commit" and None in (here[key], first[key]))
    )


def write_probe(probe: Path) -> str | None:
    """Write a mebibyte to the disk; return the error, if any."""
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"can't write {probe.parent}: {error.strerror}."
    return None


def missing_probes(folder: Path, probes: list[str]) -> list[int]:
    """Return the nodes whose files are not in `folder`; network file systems get some time to show them."""
    deadline = time.monotonic() + _GRACE
    while True:
        try:
            seen = set(os.listdir(folder))  # asks the server; a look-up of a single name may be cached
        except OSError:
            seen = set()
        missing = [number for number, probe in enumerate(probes) if probe not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def gpu_errors(required: int) -> tuple[list[str], float | None]:
    """Return the errors of this node's GPUs, and the smallest free memory of one in GiB."""
    if not required:
        return [], None
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if available < required:
        return [f"has {available} of {required} GPUs for PyTorch (driver, or a PyTorch without CUDA?)."], None
    errors, min_free = [], float("inf")
    for device in range(required):
        try:
            free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        except RuntimeError as error:
            errors.append(f"gets no answer from GPU {device}: {str(error).splitlines()[0]}.")
            continue
        min_free = min(min_free, free)
        if free < MIN_FREE_SHARE * total:
            used = f"{total - free:.1f} of {total:.1f} GiB are in use"
            errors.append(f"has no free GPU {device}: {used}; run `nvidia-smi` there to see by what.")
    return errors, min_free


def all_reduce(store: Store, rank: int, count: int, gpu: int | None, wait: timedelta) -> None:
    """Sum a mebibyte of ones over all processes: NCCL on `gpu`, gloo without one. Raises RuntimeError."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    backend, device = ("gloo", torch.device("cpu")) if gpu is None else ("nccl", torch.device("cuda", gpu))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=wait)
    try:
        ones = torch.ones(1 << 18, device=device)
        distributed.all_reduce(ones)
        if not torch.equal(ones, torch.full_like(ones, count)):
            raise RuntimeError(f"the sum of {count} ones is {ones.min().item():g} to {ones.max().item():g}")
    finally:
        distributed.destroy_process_group()


def reduce_on_cpu(nodes: Nodes) -> str | None:
    """Run the all-reduce with one process per node; return the error, if any."""
    try:
        all_reduce(PrefixStore("gloo", nodes.store), nodes.here, len(nodes.names), None, nodes.wait / 2)
    except RuntimeError as error:
        return str(error).strip().splitlines()[0].rstrip(".")
    return None


def reduce_on_gpus(nodes: Nodes, gpus: int) -> str | None:
    """Run the all-reduce with one process per GPU; return the error, if any. Processes that hang are killed."""
    seconds = int(nodes.wait.total_seconds()) // 2  # nodes where it fails at once must wait for nodes where it hangs

    def run(gpu: int) -> str | None:
        process = [str(number) for number in (nodes.here * gpus + gpu, gpus * len(nodes.names), gpu)]
        command = [sys.executable, __file__, "--recipe", "", "--timeout", str(seconds), "--process", *process]
        try:
            result = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"GPU {gpu} did not finish within {seconds} s"
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        return f"GPU {gpu}: {lines[-1].rstrip('.')}" if result.returncode else None

    with ThreadPoolExecutor(gpus) as threads:
        return next(filter(None, threads.map(run, range(gpus))), None)


def run_checks(nodes: Nodes, options: argparse.Namespace) -> str:
    """Run all checks and return a summary in one line. Raises UserError, on all nodes."""
    run_id = nodes.gather("run", uuid.uuid4().hex)[0]
    recipe, errors = None, []
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except UserError as error:
        errors.append(f"can't load the recipe: {error}")
    _raise_errors(nodes, nodes.gather("recipe", errors))
    assert recipe is not None
    code, free = _check_nodes(nodes, recipe, options.gpus, [f".preflight-{run_id}-{name}" for name in nodes.names])
    started = time.monotonic()
    failure = reduce_on_gpus(nodes, options.gpus) if options.gpus else reduce_on_cpu(nodes)
    errors = [f"failed at the all-reduce between all processes: {failure}. {_HINT}"] if failure else []
    _raise_errors(nodes, nodes.gather("all_reduce", errors))
    packages = ", ".join(f"{name} {code[name]}" for name in PACKAGES if code[name])
    processes = max(options.gpus, 1) * len(nodes.names)
    return (
        f"preflight of {os.environ.get('SLURM_JOB_NODELIST', 'one node')}: commit {code['commit'] or 'unknown'}, "
        f"Python {code['python']}, {packages}; output_dir and cache are shared and writable; "
        + (f"at least {free:.1f} GiB free on each GPU; " if free is not None else "")
        + f"all-reduce over {processes} {'process' if processes == 1 else 'processes'}: "
        + f"{time.monotonic() - started:.1f} s including start-up"
    )


def _check_nodes(nodes: Nodes, recipe: Recipe, gpus: int, probes: list[str]) -> tuple[Facts, float | None]:
    """Check code, GPUs and folders; return the versions and the smallest free memory of a GPU in GiB."""
    folders = {
        "output_dir": Path(recipe.output_dir).absolute(),
        "data.cache_dir": Path(recipe.data.cache_dir or default_folder()).expanduser().absolute(),
    }
    errors, free = gpu_errors(gpus)
    try:
        errors += filter(None, (write_probe(folder / probes[nodes.here]) for folder in folders.values()))
        facts = nodes.gather("code", code_facts())
        if differences := describe_differences(facts[nodes.here], facts[0]):
            errors.append(f"has other code than {nodes.names[0]}: {differences}.")
        _raise_errors(nodes, nodes.gather("errors", errors))
        unseen = {key: missing_probes(folder, probes) for key, folder in folders.items()}
        errors = [
            f"doesn't see in {folders[key]} what {nodes.names[missing[0]]} wrote there: all nodes must share that "
            f"folder. Give a shared one: {key}=FOLDER."
            for key, missing in unseen.items()
            if missing
        ]
        _raise_errors(nodes, nodes.gather("shared", errors))
    finally:
        for folder in folders.values():
            with suppress(OSError):
                (folder / probes[nodes.here]).unlink()
    free_on_nodes = [gib for gib in nodes.gather("free", free) if gib is not None]
    return facts[0], min(free_on_nodes, default=None)


def _raise_errors(nodes: Nodes, errors: list[list[str]]) -> None:
    """Raise UserError if any node has an error; `errors`: those of each node."""
    lines = [f"{name} {error}" for name, on_node in zip(nodes.names, errors, strict=True) for error in on_node]
    if lines:
        raise UserError(" ".join(lines))


def connect(first: bool, wait: timedelta) -> TCPStore:
    """Return the store on the first node, through which nodes and processes find each other. Raises UserError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(host, port, is_master=first, timeout=wait, wait_for_workers=False)
    except RuntimeError as error:
        failure = f"can't {'listen' if first else 'reach the first node'} at {rendezvous()}"
        here = os.environ.get("SLURMD_NODENAME", platform.node())
        raise UserError(f"{here} {failure}: {str(error).splitlines()[0]}") from error


def check_node(options: argparse.Namespace) -> None:
    """Check this node together with the others. The first node prints the summary or the error.

    Raises UserError; the message is empty where the error has been printed.
    """
    here, count = int(os.environ.get("SLURM_NODEID", "0")), int(os.environ.get("SLURM_NNODES", "1"))
    wait = timedelta(seconds=options.timeout)
    nodes = Nodes(connect(here == 0, wait), node_names(count), here, wait)
    try:
        summary = run_checks(nodes, options)
        if here == 0:
            print(summary, flush=True)
    except UserError as error:
        if here == 0:
            print_error(error)
        raise UserError("") from error
    finally:
        nodes.leave()


def main() -> int:
    """Run the command and return its exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="recipe to train")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs per node (default 0)")
    parser.add_argument(
        "--timeout", type=int, default=180, metavar="SECONDS", help="time that nodes wait for each other (default 180)"
    )
    parser.add_argument("--process", nargs=3, type=int, metavar=("RANK", "COUNT", "GPU"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the recipe")
    options, _ = parser.parse_known_intermixed_args()

    def run() -> None:
        if options.process:
            rank, processes, gpu = options.process
            wait = timedelta(seconds=options.timeout)
            all_reduce(PrefixStore("nccl", connect(False, wait)), rank, processes, gpu, wait)
        else:
            check_node(options)

    return run_command(run, "stopped", on_user_error=lambda error: print_error(error) if str(error) else None)


if __name__ == "__main__":
    sys.exit(main())
