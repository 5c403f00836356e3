"""A vLLM server for a local model: started for a block of code, and stopped after it."""

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
_POLL_SECONDS = 0.5
_SHUTDOWN_SECONDS = 30


@contextlib.contextmanager
def vllm_server(generator: LocalGenerator) -> Iterator[Server]:
    """Serve the model with its template on a free local port until the block ends.

    Raises UserError if vllm is not installed or, with the end of its log, if it does not start.
    """
    in_this_environment = Path(sys.executable).with_name("vllm")
    executable = str(in_this_environment) if in_this_environment.is_file() else shutil.which("vllm")
    if executable is None:
        raise UserError("--engine vllm: vllm is not installed. Install it (`pip install vllm`), or leave --engine out.")
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        port = _free_port()
        log = Path(folder) / "log.txt"
        with log.open("wb") as lines:
            process = subprocess.Popen(
                [executable, *_arguments(generator, Path(folder), port)],
                stdout=lines,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # so that the processes that it starts end with it
            )
        try:
            print(f"vllm loads {generator.model.model} ...", flush=True)
            while not _is_up(port):
                if process.poll() is not None:
                    last_lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-15:]
                    raise UserError(
                        f"--engine vllm: vllm ended with exit code {process.returncode}. The end of its log:\n"
                        + "\n".join(last_lines)
                    )
                time.sleep(_POLL_SECONDS)
            yield Server(f"http://127.0.0.1:{port}/v1", _CONCURRENCY)
        finally:
            _terminate(process)


def _arguments(generator: LocalGenerator, folder: Path, port: int) -> list[str]:
    template = folder / "template.jinja"
    template.write_text(str(generator.tokenizer.chat_template), encoding="utf-8")
    base = base_of(generator.model.model)
    if base is not None:
        config = json.loads((Path(generator.model.model) / "adapter_config.json").read_bytes())
        model = [base, "--enable-lora", "--max-lora-rank", str(config.get("r", 16)),
                 "--lora-modules", json.dumps({"name": generator.name, "path": generator.model.model}),
                 "--tokenizer", generator.tokenizer.name_or_path]  # fmt: skip
    else:
        model = [generator.model.model, "--served-model-name", generator.name]
    dtype = ["--dtype", generator.model.dtype] if generator.model.dtype else []
    return ["serve", *model, "--chat-template", str(template), "--host", "127.0.0.1", "--port", str(port), *dtype]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_up(port: int) -> bool:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # proxies of the environment do not apply
    try:
        with direct.open(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _terminate(process: subprocess.Popen[bytes]) -> None:
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SHUTDOWN_SECONDS)
            return
