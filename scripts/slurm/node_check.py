r"""Checks of the nodes of a job before training starts; the batch script runs it, one process on each node.

    srun --ntasks-per-node=1 python scripts/slurm/node_check.py \
        --recipe recipes/janus-7b/sft/full.yaml --gpus 8

The same code and packages everywhere; output_dir and the cache writable, and the same folders on all nodes; all GPUs
there and their memory free; and an all-reduce over all of them that ends in time. Reads SLURM_NODEID, SLURM_NNODES,
SLURMD_NODENAME, MASTER_ADDR and MASTER_PORT. Whatever is wrong is one `error:` that names the nodes and what to do; the
exit code is 2 then, on every node.
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

from train.cli import CommandLine
from train.data.cache import default_folder
from train.errors import UserError
from train.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "numpy")
FREE_SHARE = 0.9
"""Less of a GPU's memory free than this: another program has it. A CUDA context of our own takes some 0.5 GiB."""
_LATER = 10
"""Seconds: for network file systems, and between the first node's word and the others' end."""
_HINT = (
    "NCCL_DEBUG=INFO set before submitting says more; NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME name another network."
)

Facts = dict[str, str | None]


@dataclass(frozen=True)
class Nodes:
    """The nodes of this job, as number `here` of them sees them. `wait`: how long they wait for each other."""

    store: Store
    names: Sequence[str]
    here: int
    wait: timedelta

    def exchange(self, topic: str, said: Any) -> list[Any]:
        """What each node says of `topic`, in the nodes' order. Raises UserError naming those that say nothing."""
        self.store.set(f"{topic}/{self.here}", json.dumps(said))
        # The others give up later than the first node, which has the word.
        deadline = time.monotonic() + self.wait.total_seconds() + (_LATER if self.here else 0)
        heard, silent = [], []
        for number, name in enumerate(self.names):
            try:
                self.store.wait([f"{topic}/{number}"], timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                heard.append(json.loads(self.store.get(f"{topic}/{number}")))
            except RuntimeError:
                silent.append(name)
        if silent:
            raise UserError(
                f"{', '.join(silent)}: not heard of within {self.wait.total_seconds():.0f} s at {meeting_point()}. Is "
                "the node up, and does a firewall let that port through? `--sbatch=--exclude=NODE` does without it."
            )
        return heard

    def leave(self) -> None:
        """Go when no other needs this node: the first has spoken by then, and nobody asks its store any more."""
        self.store.set(f"leaving/{self.here}", "")
        others = range(1, len(self.names)) if self.here == 0 else [0]
        with suppress(RuntimeError):
            self.store.wait([f"leaving/{number}" for number in others], timedelta(seconds=_LATER))


def meeting_point() -> str:
    """Where the first node listens."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def node_names(count: int) -> list[str]:
    """The job's nodes as Slurm calls them; without Slurm, their numbers."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if listed:
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", listed],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
        if len(shown.stdout.split()) == count:
            return shown.stdout.split()
    return [f"node {number}" for number in range(count)]


def code_facts() -> Facts:
    """What is trained with: the commit, if this is a checkout; the code itself; Python and packages."""
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


def difference(here: Facts, first: Facts) -> str:
    """What is other here than on the first node, in words; empty if nothing is. git may be missing on a node."""
    return ", ".join(
        f"{key} {here[key] or 'is missing'} in the place of {first[key] or 'none'}"
        for key in here
        if here[key] != first[key] and not (key == "commit" and None in (here[key], first[key]))
    )


def write_probe(probe: Path) -> str | None:
    """Write a mebibyte to the disk; what is wrong with that."""
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as fault:
        return f"can't write {probe.parent}: {fault.strerror}."
    return None


def missing_probes(folder: Path, probes: list[str]) -> list[int]:
    """Which of the nodes' files are not in `folder`; network file systems get some time to show them."""
    deadline = time.monotonic() + _LATER
    while True:
        try:
            seen = set(os.listdir(folder))  # asks the server, where a single name may be answered from a cache
        except OSError:
            seen = set()
        missing = [number for number, probe in enumerate(probes) if probe not in seen]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.2)


def gpu_faults(wanted: int) -> tuple[list[str], float | None]:
    """What is wrong with this node's GPUs, and the least free memory of one in GiB."""
    if not wanted:
        return [], None
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found < wanted:
        return [f"has {found} of {wanted} GPUs for PyTorch (driver, or a PyTorch without CUDA?)."], None
    faults, least = [], float("inf")
    for device in range(wanted):
        try:
            free, whole = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        except RuntimeError as fault:
            faults.append(f"gets no answer from GPU {device}: {str(fault).splitlines()[0]}.")
            continue
        least = min(least, free)
        if free < FREE_SHARE * whole:
            taken = f"{whole - free:.1f} of {whole:.1f} GiB are taken"
            faults.append(f"has no free GPU {device}: {taken}; `nvidia-smi` there says by what.")
    return faults, least


def all_reduce(store: Store, rank: int, count: int, gpu: int | None, wait: timedelta) -> None:
    """Add up a mebibyte of ones over all processes: NCCL on `gpu`, gloo without one. Raises RuntimeError."""
    if gpu is not None:
        torch.cuda.set_device(gpu)
    backend, device = ("gloo", torch.device("cpu")) if gpu is None else ("nccl", torch.device("cuda", gpu))
    distributed.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=wait)
    try:
        ones = torch.ones(1 << 18, device=device)
        distributed.all_reduce(ones)
        if not torch.equal(ones, torch.full_like(ones, count)):
            raise RuntimeError(f"the sum of {count} ones came out as {ones.min().item():g} to {ones.max().item():g}")
    finally:
        distributed.destroy_process_group()


def reduce_on_cpu(nodes: Nodes) -> str | None:
    """The all-reduce with one process on each node; what went wrong."""
    try:
        all_reduce(PrefixStore("gloo", nodes.store), nodes.here, len(nodes.names), None, nodes.wait / 2)
    except RuntimeError as fault:
        return str(fault).strip().splitlines()[0].rstrip(".")
    return None


def reduce_on_gpus(nodes: Nodes, gpus: int) -> str | None:
    """The all-reduce with one process on each GPU; what went wrong. Processes that hang are killed."""
    seconds = int(nodes.wait.total_seconds()) // 2  # so that nodes where it fails at once wait for those where it hangs

    def run(gpu: int) -> str | None:
        process = [str(number) for number in (nodes.here * gpus + gpu, gpus * len(nodes.names), gpu)]
        command = [sys.executable, __file__, "--recipe", "", "--timeout", str(seconds), "--process", *process]
        try:
            ended = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=False, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            return f"GPU {gpu} did not get through it within {seconds} s"
        lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
        return f"GPU {gpu}: {lines[-1].rstrip('.')}" if ended.returncode else None

    with ThreadPoolExecutor(gpus) as threads:
        return next(filter(None, threads.map(run, range(gpus))), None)


def look(nodes: Nodes, options: argparse.Namespace) -> str:
    """All of it; what was found, in one line. Raises UserError, on all nodes alike."""
    mark = nodes.exchange("mark", uuid.uuid4().hex)[0]
    recipe, unreadable = None, []
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except UserError as fault:
        unreadable.append(f"can't use the recipe: {fault}")
    _settle(nodes, nodes.exchange("recipe", unreadable))
    assert recipe is not None
    code, free = _look_at_each(nodes, recipe, options.gpus, [f".preflight-{mark}-{name}" for name in nodes.names])
    started = time.monotonic()
    failure = reduce_on_gpus(nodes, options.gpus) if options.gpus else reduce_on_cpu(nodes)
    failures = [f"failed at the all-reduce between all processes: {failure}. {_HINT}"] if failure else []
    _settle(nodes, nodes.exchange("reduced", failures))
    packages = ", ".join(f"{name} {code[name]}" for name in PACKAGES if code[name])
    processes = max(options.gpus, 1) * len(nodes.names)
    return (
        f"preflight of {os.environ.get('SLURM_JOB_NODELIST', 'one node')}: commit {code['commit'] or 'unknown'}, "
        f"Python {code['python']}, {packages}; output_dir and cache are shared and writable; "
        + (f"at least {free:.1f} GiB free on each GPU; " if free is not None else "")
        + f"all-reduce over {processes} {'process' if processes == 1 else 'processes'}: "
        + f"{time.monotonic() - started:.1f} s with its start"
    )


def _look_at_each(nodes: Nodes, recipe: Recipe, gpus: int, probes: list[str]) -> tuple[Facts, float | None]:
    """Code, GPUs and folders: what all nodes have, and the least free memory of a GPU in GiB."""
    folders = {
        "output_dir": Path(recipe.output_dir).absolute(),
        "data.cache_dir": Path(recipe.data.cache_dir or default_folder()).expanduser().absolute(),
    }
    faults, free = gpu_faults(gpus)
    try:
        faults += filter(None, (write_probe(folder / probes[nodes.here]) for folder in folders.values()))
        facts = nodes.exchange("code", code_facts())
        if other := difference(facts[nodes.here], facts[0]):
            faults.append(f"has other code than {nodes.names[0]}: {other}.")
        _settle(nodes, nodes.exchange("faults", faults))
        unseen = {key: missing_probes(folder, probes) for key, folder in folders.items()}
        faults = [
            f"doesn't see in {folders[key]} what {nodes.names[missing[0]]} wrote there: all nodes must share that "
            f"folder. Name one that they do: {key}=FOLDER."
            for key, missing in unseen.items()
            if missing
        ]
        _settle(nodes, nodes.exchange("shared", faults))
    finally:
        for folder in folders.values():
            with suppress(OSError):
                (folder / probes[nodes.here]).unlink()
    least = [one for one in nodes.exchange("free", free) if one is not None]
    return facts[0], min(least, default=None)


def _settle(nodes: Nodes, faults: list[list[str]]) -> None:
    """Raise UserError where any node has a fault."""
    told = [f"{name} {fault}" for name, its in zip(nodes.names, faults, strict=True) for fault in its]
    if told:
        raise UserError(" ".join(told))


def connect(first: bool, wait: timedelta) -> TCPStore:
    """The store on the first node, through which nodes and processes find each other. Raises UserError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(host, port, is_master=first, timeout=wait, wait_for_workers=False)
    except RuntimeError as fault:
        tried = f"can't {'listen' if first else 'reach the first node'} at {meeting_point()}"
        here = os.environ.get("SLURMD_NODENAME", platform.node())
        raise UserError(f"{here} {tried}: {str(fault).splitlines()[0]}") from fault


def check_node(options: argparse.Namespace) -> None:
    """Check this node with the others. Raises UserError; the text is empty where the first node says it."""
    here, count = int(os.environ.get("SLURM_NODEID", "0")), int(os.environ.get("SLURM_NNODES", "1"))
    wait = timedelta(seconds=options.timeout)
    nodes = Nodes(connect(here == 0, wait), node_names(count), here, wait)
    try:
        said = look(nodes, options)
        if here == 0:
            print(said, flush=True)
    except UserError as fault:
        if here == 0:
            print(f"error: {fault}", file=sys.stderr, flush=True)
        raise UserError("") from fault
    finally:
        nodes.leave()


def main() -> int:
    """Run the command; the exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="the recipe that will be trained")
    parser.add_argument("--gpus", type=int, default=0, metavar="N", help="GPUs that each node must have (default 0)")
    parser.add_argument(
        "--timeout", type=int, default=180, metavar="SECONDS", help="how long nodes wait for each other (default 180)"
    )
    parser.add_argument("--process", nargs=3, type=int, metavar=("RANK", "COUNT", "GPU"), help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the recipe by dotted key")
    options, _ = parser.parse_known_intermixed_args()
    try:
        if options.process:
            rank, processes, gpu = options.process
            wait = timedelta(seconds=options.timeout)
            all_reduce(PrefixStore("nccl", connect(False, wait)), rank, processes, gpu, wait)
        else:
            check_node(options)
    except UserError as fault:
        if str(fault):
            print(f"error: {fault}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
