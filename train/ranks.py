"""Ranks: world size, first rank and checks of how the run was launched, from the launcher's environment variables."""

import os
from collections.abc import Mapping
from typing import Any

_WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""World size variables of torchrun and the MPIs, as accelerate reads them."""
_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK")
"""Rank variables that DeepSpeed needs to start its process group, for a single process too."""


def deepspeed_launch_error(deepspeed: object, environment: Mapping[str, str]) -> str | None:
    """Return an error if `training.deepspeed` is set and no launcher started this process; else None."""
    if not deepspeed or any(name in environment for name in _RANKS):
        return None
    return (
        "training.deepspeed: DeepSpeed needs a launcher, for a single process too. Start the run with "
        "`torchrun --nproc_per_node N train/sft.py`, or remove the key and start it with `accelerate launch "
        "--config_file accelerate_configs/zero2.yaml`."
    )


def parallelism_error(environment: Mapping[str, str]) -> str | None:
    """Return an error if the launch divides sequences or weights in an unsupported way of accelerate's; else None.

    Supported is sharded data parallelism (HSDP: `dp_replicate_size` groups of `dp_shard_size` ranks).

    Sequence parallelism (`sp_size`): accelerate 1.15 gathers the batches of a group by their second dimension, which
    packed rows' `cu_seq_lens` doesn't have. Context parallelism (`cp_size`) drops the masks that keep packed documents
    apart (TRL refuses it with its own packing). Tensor parallelism (`tp_size`): the ranks of a group would be counted
    as data parallel.
    """
    if environment.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return None
    sizes = {name: environment.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1") for name in ("SP", "CP", "TP")}
    used = [f"parallelism_config_{name.lower()}_size: {size}" for name, size in sizes.items() if size != "1"]
    if not used:
        names = [f"parallelism_config_dp_{part}_size" for part in ("replicate", "shard")]
        replicas, shards = (int(environment.get(name.upper(), "1")) for name in names)
        ranks, of_a_node = _count_ranks(environment)
        if replicas * shards == ranks:
            return None
        advice = "Launch one node with accelerate_configs/fsdp2.yaml."
        if ranks > of_a_node:
            advice = f"In a copy of the file, write {ranks // of_a_node} (nodes) and {of_a_node} (processes of a node)."
        return (
            f"{names[0]}: {replicas} x {names[1]}: {shards} in the launch configuration must be the number of "
            f"processes ({ranks}). {advice}"
        )
    return (
        f"{', '.join(used)} in the launch configuration: accelerate's sequence, context and tensor parallelism do not "
        "support packed rows. Remove it there. To divide long sequences between GPUs, write `model.sequence_parallel` "
        "in the recipe."
    )


def hpz_error(deepspeed: Mapping[str, Any], environment: Mapping[str, str]) -> str | None:
    """Return an error if DeepSpeed's configuration has a second copy of the weights that spans nodes; else None.

    DeepSpeed makes groups of consecutive ranks, whatever their nodes: the copy is only of use within one.
    """
    key = "zero_hpz_partition_size"
    ranks, of_a_node = _count_ranks(environment)
    size = min((deepspeed.get("zero_optimization") or {}).get(key) or 1, ranks)
    if of_a_node % size == 0:
        return None
    return (
        f"the DeepSpeed configuration has `zero_optimization.{key}: {size}`, which doesn't divide the {of_a_node} "
        f"processes of a node. Write {of_a_node} in a copy of the file."
    )


def _count_ranks(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the number of processes, and that of a node."""
    ranks = int(environment.get("WORLD_SIZE", "1"))
    return ranks, int(environment.get("LOCAL_WORLD_SIZE", ranks))


def single_process_warning(environment: Mapping[str, str]) -> str | None:
    """Return a warning if `accelerate launch` was asked for several processes and started only this one; else None.

    For `distributed_type` NO and MULTI_CPU accelerate (1.15, `simple_launcher`) starts one process whatever
    --num_processes says; several need mpirun (--mpirun_hostfile). The only trace of the number is the rendezvous
    address (`prepare_simple_launcher_cmd_env`), which it sets for more than one process. A shell may have exported the
    same address, so this is a warning and not an error.
    """
    if "ACCELERATE_MIXED_PRECISION" not in environment or any(name in environment for name in _WORLD_SIZES):
        return None
    if environment.get("MASTER_ADDR") != "127.0.0.1" or "MASTER_PORT" not in environment:
        return None
    return (
        "accelerate launch was asked for several processes and started only this one: distributed_type NO and "
        "MULTI_CPU start a single process, and so does --cpu. For several, with or without GPUs: --config_file "
        "accelerate_configs/ddp.yaml --num_processes N, without --cpu."
    )


def is_launched(environment: Mapping[str, str]) -> bool:
    """Return whether `accelerate launch`, torchrun or an MPI started this process."""
    return any(name in environment for name in ("ACCELERATE_MIXED_PRECISION", *_WORLD_SIZES))


def is_launched_by_fsdp(environment: Mapping[str, str]) -> bool:
    """Return whether the launch configuration asks for FSDP."""
    return environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def is_first_rank() -> bool:
    """Return whether this process prints and writes for all ranks; true without a launcher too."""
    return int(os.environ.get("RANK", "0")) == 0


def world_size() -> int:
    """Return the number of processes of the launcher; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))
