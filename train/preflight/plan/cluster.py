"""The GPUs that a run is planned for, as `--gpus 8x80GB --nodes 2 --mfu 0.4` names them."""

import re
from dataclasses import dataclass

from train.errors import UserError
from train.model.flops import DEFAULT_GPU, DEFAULT_MFU, MEMORY_MIB, PEAK_FLOPS

RESERVE = 0.08
"""Share of a GPU left to the CUDA context, NCCL, kernels' workspaces and gaps between blocks: our own estimate."""
GIB = 2**30
MAX_GPUS = 16_384
"""More than any published run has had (Llama 3 405B: arXiv:2407.21783, section 3.3)."""
_GPUS = re.compile(r"(\d+)\s*x\s*(?:([A-Za-z][A-Za-z0-9]*?)(?:-|(?=\d+GB$)|$))?(?:(\d+)\s*GB)?", re.IGNORECASE)


@dataclass(frozen=True)
class Cluster:
    """`nodes` machines with `gpus` GPUs each.

    - `memory`: bytes of one GPU;
    - `peak_flops`: FLOP/s of matrix products on one GPU, by the data sheet of `gpu`: of bfloat16, or of float32 where
      a run computes in it;
    - `assumed`: no GPU was named, so `gpu` is DEFAULT_GPU;
    - `mfu`: share of the peak that training reaches.
    """

    gpus: int
    nodes: int
    gpu: str
    memory: int
    peak_flops: float
    assumed: bool
    mfu: float

    @property
    def processes(self) -> int:
        """Number of GPUs in the cluster, each of which has a process."""
        return self.gpus * self.nodes

    @property
    def usable_memory(self) -> float:
        """Bytes of a GPU that a run may take: all but RESERVE of it."""
        return self.memory * (1 - RESERVE)

    def hours(self, flops: float) -> float:
        """Return the hours that all GPUs take for `flops` at `mfu`."""
        return flops / (self.processes * self.peak_flops * self.mfu) / 3_600


def parse_cluster(gpus: str, nodes: int | None = None, mfu: float | None = None) -> Cluster:
    """Parse the GPUs of one node: `8x80GB`, `8xH100` or `8xA100-80GB`.

    A named GPU has the memory that its driver reports; else a GB is 2^30 bytes.
    `nodes` defaults to 1, `mfu` to DEFAULT_MFU. Raises UserError for text that can't be parsed, an unknown GPU, and one
    that is sold in several sizes if none is given.
    """
    nodes, mfu = 1 if nodes is None else nodes, DEFAULT_MFU if mfu is None else mfu
    match = _GPUS.fullmatch(gpus.strip())
    if not match or not (match[2] or match[3]) or int(match[1]) < 1:
        raise UserError(f"--gpus: {gpus!r} is not N x GPU. Write the GPUs of one node, such as 8x80GB or 8xH100-80GB.")
    name = (match[2] or "").upper()
    if name and name not in PEAK_FLOPS:
        raise UserError(f"--gpus: {match[2]} is not known. Known: {', '.join(PEAK_FLOPS)}; or write the size alone.")
    sizes = [size for gpu, size in MEMORY_MIB if gpu == name]
    size = int(match[3] or (sizes[0] if len(sizes) == 1 else 0))
    if size < 1:
        raise UserError(f"--gpus: {name} comes in several sizes. Write which, such as {match[1]}x{name}-80GB.")
    if not 1 <= nodes * int(match[1]) <= MAX_GPUS:
        raise UserError(f"--gpus, --nodes: found {nodes} times {match[1]}. Write 1 to {MAX_GPUS:,} GPUs in all.")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu: found {mfu}. Write a share of the GPU's peak, such as {DEFAULT_MFU}.")
    gpu = name or DEFAULT_GPU
    memory = MEMORY_MIB.get((name, size), size * 1_024) * 2**20
    return Cluster(int(match[1]), nodes, gpu, memory, PEAK_FLOPS[gpu], not name, mfu)
