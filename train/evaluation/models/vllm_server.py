"""vLLM for as long as a checkpoint's answers are asked for: started as a server of its own, and ended."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from train.errors import UserError
from train.evaluation.models.local import LocalGenerator, base_of
from train.llm.server import Server

_CONCURRENCY = 256
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_END = 30


@contextlib.contextmanager
def vllm_server(opened: LocalGenerator) -> Iterator[Server]:
    """A server of the checkpoint with its template, on a free port of this machine alone; gone when the block ends.

    Raises UserError where vllm isn't installed, and, with the end of what it said, where it doesn't come up.
    """
    beside = Path(sys.executable).with_name("vllm")
    executable = str(beside) if beside.is_file() else shutil.which("vllm")
    if executable is None:
        raise UserError("--engine vllm: vllm is not installed. Install it (`pip install vllm`), or leave --engine out.")
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        port = _free_port()
        log = Path(folder) / "log.txt"
        with log.open("wb") as lines:
            process = subprocess.Popen(
                [executable, *_arguments(opened, Path(folder), port)],
                stdout=lines,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # it starts processes of its own, which are to end with it
            )
        try:
            print(f"vllm loads {opened.checkpoint.model} ...", flush=True)
            while not _is_up(port):
                if process.poll() is not None:
                    told = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
                    raise UserError(
                        f"--engine vllm: vllm ended with exit code {process.returncode}. The last it said:\n"
                        + "\n".join(told)
                    )
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            yield Server(f"http://127.0.0.1:{port}/v1", _CONCURRENCY)
        finally:
            _end(process)


def _arguments(opened: LocalGenerator, folder: Path, port: int) -> list[str]:
    checkpoint = opened.checkpoint
    template = folder / "template.jinja"
    template.write_text(str(opened.tokenizer.chat_template), encoding="utf-8")
    base = base_of(checkpoint.model)
    if base is not None:
        about = json.loads((Path(checkpoint.model) / "adapter_config.json").read_bytes())
        model = [base, "--enable-lora", "--max-lora-rank", str(about.get("r", 16)),
                 "--lora-modules", json.dumps({"name": opened.name, "path": checkpoint.model}),
                 "--tokenizer", opened.tokenizer.name_or_path]  # fmt: skip
    else:
        model = [checkpoint.model, "--served-model-name", opened.name]
    dtype = ["--dtype", checkpoint.dtype] if checkpoint.dtype else []
    return ["serve", *model, "--chat-template", str(template), "--host", "127.0.0.1", "--port", str(port), *dtype]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_up(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SECONDS_TO_END)
            return
