"""Launches of train/sft.py on CPU processes that share their imports.

Python's fork server imports torch, TRL and DeepSpeed once; each rank of each launch is a fresh fork of it, with the
environment that `accelerate launch` would set. (Imports take about ten seconds, training the tiny model one or two.)
"""

import argparse
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PRELOADED_MODULES = [
    "train.warning_filters",
    "deepspeed",
    "train.sft",
    "train.finetune",
    "train.preflight.missing_files",
    "train.system_gain.metric",
    "transformers.models.llama.modeling_llama",
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.nn.attention.varlen",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "warm_up",  # the last one
]
SERVER_ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # the ranks share few cores
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
}


@dataclass(frozen=True)
class LaunchResult:
    """Result of a launch: exit code and output of each rank."""

    exit_codes: list[int]
    output: list[str]

    def succeeded(self) -> "LaunchResult":
        """Return this result if all ranks ended with 0."""
        assert self.exit_codes == [0] * len(self.exit_codes), "\n".join(
            f"rank {rank} ended with {code}:\n{text[-4000:]}"
            for rank, (code, text) in enumerate(zip(self.exit_codes, self.output, strict=True))
        )
        return self


def sft(*arguments: str) -> int:
    """Run train/sft.py as a rank does."""
    from train.sft import main

    return main(list(arguments))


def launch(
    processes: int,
    config: str | None,
    *arguments: str | Path,
    logs: Path,
    job: Callable[..., int | None] = sft,
    timeout: float = 240,
) -> LaunchResult:
    """Run `job` with `arguments` on `processes` ranks of one group and wait.

    `config`: a file of accelerate_configs; None for plain processes, as torchrun starts them (DDP). `logs`: a folder
    for the output of the ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED_MODULES)
    environment = {**_environment(processes, config), "MASTER_PORT": str(free_port())}
    logs.mkdir(parents=True, exist_ok=True)
    files = [logs / f"rank-{rank}.txt" for rank in range(processes)]
    ranks = []
    before = {name: os.environ.get(name) for name in SERVER_ENVIRONMENT}
    os.environ.update(SERVER_ENVIRONMENT)
    try:
        for rank, file in enumerate(files):
            ours = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else environment
            process = context.Process(target=_run, args=(job, [str(argument) for argument in arguments], ours, file))
            process.start()
            ranks.append(process)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    for process in ranks:
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
    return LaunchResult([process.exitcode for process in ranks], [file.read_text(errors="replace") for file in files])


def _run(job: Callable[..., int | None], arguments: list[str], environment: dict[str, str], file: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with file.open("wb", buffering=0) as output:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = ["train/sft.py", *arguments]
    _leave_collectives_to_gloo()
    if "ACCELERATE_USE_FSDP" in environment:
        _shard_on_cpus()
    sys.exit(job(*arguments))


def _leave_collectives_to_gloo() -> None:
    """Disable DeepSpeed's shared memory collectives: they are compiled at the first use, and waiting ranks occupy a core."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _shard_on_cpus() -> None:
    """Let accelerate use FSDP, which it ignores for ranks of the kind MULTI_CPU (`AcceleratorState.__init__`)."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    initialize = PartialState.__init__

    def initialize_as_gpus(self: PartialState, *arguments: Any, **keywords: Any) -> None:
        initialize(self, *arguments, **keywords)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = initialize_as_gpus


def _environment(processes: int, config: str | None) -> dict[str, str]:
    """Return the environment that accelerate (DeepSpeed, FSDP) and torchrun set for every rank."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    environment = dict(os.environ) | SERVER_ENVIRONMENT
    if config is not None:
        line = ["--config_file", str(ROOT / "accelerate_configs" / config), "--num_processes", str(processes)]
        args: argparse.Namespace = launch_command_parser().parse_args([*line, "--main_process_port", "0", "sft.py"])
        args, defaults, _ = _validate_launch_command(args)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(
                defaults.deepspeed_config
            )  # as accelerate's own launcher
            given: dict[str, Any] = prepare_deepspeed_cmd_env(args)[1]
        else:
            given = prepare_multi_gpu_env(args)
        prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
        environment |= {name: value for name, value in given.items() if name.startswith(prefixes)}
    if processes > 1 or config is not None:
        environment |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
        }
    return environment


def free_port() -> int:
    """Return a port that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
