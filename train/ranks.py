"""What the launcher's environment tells about how a run was started."""

import os
from collections.abc import Mapping

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""What torchrun and the MPIs set; accelerate reads the same."""
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK")
"""Variables that DeepSpeed starts its process group from, also for one process."""


def deepspeed_launch_error(deepspeed: object, environment: Mapping[str, str]) -> str | None:
    """Return why `training.deepspeed` can't be used in a process started with this environment; None if it can."""
    if not deepspeed or any(name in environment for name in _RANKS):
        return None
    return (
        "training.deepspeed: DeepSpeed needs a launcher, for one process too, and there is none. Start the run with "
        "`torchrun --nproc_per_node N train/sft.py`, or take the key out and start it with `accelerate launch "
        "--config_file accelerate_configs/zero2.yaml`."
    )


def single_process_warning(environment: Mapping[str, str]) -> str | None:
    """What to tell whoever asked `accelerate launch` for several processes and got this one alone; else None.

    For `distributed_type` NO and MULTI_CPU accelerate (1.15, `simple_launcher`) starts one process, whatever
    --num_processes says: several are left to mpirun, by --mpirun_hostfile. All that is to be seen of the number is the
    address where they would have met (`prepare_simple_launcher_cmd_env`), which it sets for more than one alone. A
    shell may have exported the same, so nothing is refused for it.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment or any(name in environment for name in _SIZES):
        return None
    if environment.get("MASTER_ADDR") != "127.0.0.1" or "MASTER_PORT" not in environment:
        return None
    return (
        "accelerate launch was asked for several processes and has started this one alone: distributed_type NO and "
        "MULTI_CPU are for one. For several, with or without GPUs: --config_file accelerate_configs/ddp.yaml "
        "--num_processes N."
    )


def is_first_rank() -> bool:
    """Whether this process is the one that speaks; true also where there is one process alone."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
