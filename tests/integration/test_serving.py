"""A trained model behind transformers' own server: the same template as in training."""

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from transformers import AutoTokenizer

from train.data.chat.template import render, use_template
from train.sft import main


def ask(url: str, body: dict, server: subprocess.Popen) -> dict:
    """Return the server's answer; repeat the request while the server starts, for at most two minutes."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except (urllib.error.URLError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=0.2)
            if server.poll() is not None or time.monotonic() > deadline:
                raise


def test_transformers_serve_renders_what_training_rendered(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """The server's count of prompt tokens equals that of the training template up to the answer."""
    assert main(["--recipe", str(recipe_file(training={"num_train_epochs": ..., "max_steps": 1}))]) == 0
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        messages = [{"role": "system", "content": "river stone"}, {"role": "user", "content": "amber?"}]
        body = {"model": str(run), "messages": messages, "max_tokens": 4, "temperature": 0}
        answer = ask(f"http://127.0.0.1:{port}/v1/chat/completions", body, server)
    finally:
        server.terminate()
        server.wait(timeout=30)
    tokenizer = AutoTokenizer.from_pretrained(run)
    use_template(tokenizer, "chatml")
    trained, ((start, _),) = render(tokenizer, [*messages, {"role": "assistant", "content": "so"}])
    assert answer["usage"]["prompt_tokens"] == len(tokenizer(trained[:start]).input_ids)
    assert answer["choices"][0]["message"]["role"] == "assistant"
