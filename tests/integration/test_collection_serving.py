"""A collection by a real small model behind transformers' own server: what it says is taken, or left out with a reason."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import yaml

from train.data.sources import conversations
from train.multifaceted.collection import run
from train.multifaceted.collection_config import load_config
from train.recipe import Source

ROOT = Path(__file__).parents[2]


def test_a_set_by_a_real_server_and_nothing_asked_again(smollm2: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = yaml.safe_load((ROOT / "recipes" / "collection" / "smollm2-135m.yaml").read_text("utf-8"))
    settings |= {
        "model": str(smollm2),
        "servers": [{"base_url": f"http://127.0.0.1:{port}/v1", "concurrency": 2}],
        "data": {"sources": [{"path": str(ROOT / "recipes" / "smollm2-135m" / "data" / "train.jsonl")}], "limit": 1},
        "sets_per_instruction": 1,
        "retries": 0,
        "output_dir": str(tmp_path / "out"),
    }
    settings["answer"]["max_tokens"] = 16
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [Path(sys.executable).with_name("transformers"), "serve", "--device", "cpu", "--dtype", "float32"]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        wait_until_it_serves(f"http://127.0.0.1:{port}/health", server)
        done = run(load_config(path))
    finally:
        server.kill()  # it would finish what it is generating first
        server.wait(timeout=30)
    facts = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (facts["rows"], facts["instructions"], facts["sets"]) == (1, 1, 1)
    assert facts["sets_written"] + sum(facts["sets_left_out"].values()) == 1
    assert done.counts.answered == sum(of["requests"] for of in facts["spent"].values()) >= 1
    assert all(of["completion_tokens"] > 0 for of in facts["spent"].values())
    if facts["sets_written"]:
        ((_, row),) = conversations(Source(path=str(tmp_path / "out" / "data")))
        assert [message["role"] for message in row.messages] == ["system", "user", "assistant"]
    again = run(load_config(path)).counts  # the server is gone: all is in the journal
    assert (again.answered, again.from_journal) == (done.counts.answered, done.counts.answered)


def wait_until_it_serves(url: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, ConnectionError):
            with suppress(subprocess.TimeoutExpired):
                server.wait(timeout=0.2)
    raise AssertionError("the server did not start")
