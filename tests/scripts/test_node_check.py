"""scripts/slurm/node_check.py, with one process of this machine per node."""

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from train.loop.preemption import Preemption
from train.recipe import SaveSection

ROOT = Path(__file__).parents[2]
SCRIPT = Path("scripts") / "slurm" / "node_check.py"


@dataclass
class Node:
    checkout: Path = ROOT
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def preflight(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., list[tuple[int, str, str]]]:
    """Run a process per node and return (exit code, stdout, stderr) of each; `absent`: nodes that never start."""
    recipe = recipe_file(data={"cache_dir": ...})

    def run(*nodes: Node, absent: int = 0, port: int = 0) -> list[tuple[int, str, str]]:
        shared = os.environ | {
            "SLURM_NNODES": str(len(nodes) + absent),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port or free_port()),
            "HF_HOME": str(tmp_path / "home"),
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        shared.pop("SLURM_JOB_NODELIST", None)
        processes = [
            subprocess.Popen(
                [sys.executable, node.checkout / SCRIPT, "--recipe", recipe, "--timeout", "60", *node.arguments],
                env=shared | {"PYTHONPATH": str(node.checkout), "SLURM_NODEID": str(number)} | node.environment,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for number, node in enumerate(nodes)
        ]  # fmt: skip
        try:
            texts = [process.communicate(timeout=120) for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]

    return run


def the_error(ended: list[tuple[int, str, str]]) -> str:
    """Return the text after the only `error:`; all nodes exited with 2."""
    assert [code for code, _, _ in ended] == [2] * len(ended), ended
    (line,) = [line for _, _, text in ended for line in text.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in "".join(text for _, _, text in ended)
    return line.removeprefix("error: ")


def test_equal_nodes_print_one_line_and_leave_no_files(
    preflight: Callable[..., list[tuple[int, str, str]]], tmp_path: Path
) -> None:
    ended = preflight(Node(), Node())
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert [text for _, text, _ in ended][1] == ""
    (line,) = ended[0][1].splitlines()
    assert f"Python {platform.python_version()}, torch {importlib.metadata.version('torch')}" in line
    assert "all-reduce over 2 processes" in line
    assert not list((tmp_path / "run").iterdir())
    assert not list((tmp_path / "home" / "janus-sft").iterdir())


def test_a_cache_that_is_not_shared_is_an_error_of_its_node(
    preflight: Callable[..., list[tuple[int, str, str]]], tmp_path: Path
) -> None:
    error = the_error(preflight(Node(), Node(environment={"HF_HOME": str(tmp_path / "elsewhere")})))
    assert f"node 1 doesn't see in {tmp_path}/elsewhere/janus-sft what node 0 wrote there" in error
    assert "data.cache_dir=FOLDER" in error


def test_different_code_is_an_error_of_its_node(
    preflight: Callable[..., list[tuple[int, str, str]]], tmp_path: Path
) -> None:
    for part in ("train", "scripts"):
        shutil.copytree(ROOT / part, tmp_path / "copy" / part)
    with (tmp_path / "copy" / "train" / "errors.py").open("a") as file:
        file.write("# another line\n")
    error = the_error(preflight(Node(), Node(checkout=tmp_path / "copy")))
    assert error.startswith("node 1 has other code than node 0: train/ ")
    assert "torch" not in error  # which is the same


def test_a_folder_that_cannot_be_written_is_an_error(
    preflight: Callable[..., list[tuple[int, str, str]]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    broken = Node(arguments=(f"output_dir={tmp_path}/file/below",))
    assert the_error(preflight(Node(), broken)).startswith(
        f"node 1 can't write {tmp_path}/file/below: Not a directory."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are GPUs here")
def test_missing_gpus_are_counted_per_node(preflight: Callable[..., list[tuple[int, str, str]]]) -> None:
    wanting = Node(arguments=("--gpus", "2"))
    error = the_error(preflight(wanting, wanting))
    assert "node 0 has 0 of 2 GPUs for PyTorch" in error
    assert "node 1 has 0 of 2 GPUs for PyTorch" in error


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_free_gpu_joins_the_all_reduce_and_a_busy_one_is_an_error(
    preflight: Callable[..., list[tuple[int, str, str]]],
) -> None:
    ((code, output, errors),) = preflight(Node(arguments=("--gpus", "1")))
    assert code == 0, errors
    assert "GiB free on each GPU; all-reduce over 1 process:" in output
    _, total = torch.cuda.mem_get_info(0)
    taken = torch.empty(int(0.15 * total), dtype=torch.uint8, device="cuda")
    assert the_error(preflight(Node(arguments=("--gpus", "1")))).startswith("node 0 has no free GPU 0: ")
    del taken


def test_a_missing_node_is_named_after_the_timeout(preflight: Callable[..., list[tuple[int, str, str]]]) -> None:
    error = the_error(preflight(Node(arguments=("--timeout", "2")), absent=1))
    assert error.startswith("node 1: no message within 2 s at 127.0.0.1:")


def test_a_port_in_use_is_an_error(preflight: Callable[..., list[tuple[int, str, str]]]) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"can't listen at 127.0.0.1:{port}: " in the_error(preflight(Node(), port=port))


def test_the_stop_file_is_the_reason_on_the_first_rank_even_if_another_rank_saw_it(tmp_path: Path) -> None:
    """The batch script requeues unless the user touched output_dir/stop: the first rank must report that file."""
    first = Preemption(str(tmp_path), SaveSection())
    assert not first.is_requested()
    (tmp_path / "stop").touch()
    assert not first.is_requested()  # it looks only now and then
    first.agree()  # another rank was asked to stop
    assert first.reason == "the file stop"
