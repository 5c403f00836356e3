"""scripts/evaluate.py: a second run of a command in the same folder is refused, with the process of the first."""

import importlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from harness_tasks import multiple_choice

ROOT = Path(__file__).parents[2]
RULES = "class Rule:\n    check = staticmethod(lambda question, text: True)\n\nRULES = {'any': Rule}\n"

LOCK = "import sys, pathlib, train.storage.file_lock as locks; lock = locks.acquire_lock(pathlib.Path(sys.argv[1]))"
HOLD = f"{LOCK}; import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
"""Take a lock; HOLD then stops its process while it holds the lock."""


@pytest.fixture
def arguments(tiny_chat_model: Path, tmp_path: Path) -> dict[str, list[object]]:
    """Arguments of each command, all with results in `out`."""
    turns = [{"role": role, "content": f"a {role}"} for role in ("system", "user", "assistant")]
    others = [turns[0] | {"content": "another"}, *turns[1:]]
    rows = [{"messages": messages, "rule": "any", "held_out": "rule"} for messages in (turns, others)]
    data, rules, out = tmp_path / "rows.jsonl", tmp_path / "rules.py", tmp_path / "out"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rules.write_text(RULES, encoding="utf-8")
    ifeval = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    asked = tmp_path / "ifeval.jsonl"
    asked.write_text(json.dumps(ifeval | {"messages": turns[:2]}) + "\n", encoding="utf-8")
    out.mkdir()
    for path in tiny_chat_model.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = multiple_choice("lost", tmp_path / "nowhere.jsonl")
    (tasks / "lost.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    short = ["--max-new-tokens", "2"]
    return {
        "gain": ["--model", tiny_chat_model, "--data", data, "--json", out / "gain.json"],
        "rules": ["--rules", rules, "--data", data, "--before", tiny_chat_model, "--after", out, *short],
        "ifeval": ["--model", tiny_chat_model, "--data", asked, "--output-dir", out, *short],
        "turns": ["--model", tiny_chat_model, "--conversations", "1", "--turns", "1", "--push-back-at", "null",
                  "--no-gain", "--output-dir", out, *short],
        "harness": ["--model", tiny_chat_model, "--tasks", "lost", "--include-path", tasks, "--output-dir", out],
        "bench": ["--model", "m", "--data", data, "--judge", "j", "--judge-server", "http://localhost:1/v1",
                  "--output-dir", out],
    }  # fmt: skip


WHERE = {
    "gain": ("train.system_gain.metric", "system_gain"),
    "rules": ("train.evaluation.models.responses", "generate_answers"),
    "ifeval": ("train.evaluation.models.responses", "generate_answers"),
    "turns": ("train.evaluation.models.responses", "generate_answers"),
    "harness": ("train.evaluation.harness", "task_names"),
    "bench": ("train.multifaceted.bench.rows", "read_bench"),
}


@contextmanager
def held(lock: Path) -> Iterator[int]:
    """Yield the id of a process that holds a lock; kill it at the end."""
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], cwd=ROOT)
    try:
        _, status = os.waitpid(holder.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("name", WHERE)
def test_a_second_run_is_refused_and_a_killed_run_leaves_no_lock(
    name: str,
    arguments: dict[str, list[object]],
    says_no: Callable[..., str],
    command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    lock = out / f".{name}.lock"
    with held(lock) as process:
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        refused = says_no(name, *arguments[name])
        assert f"{out}: another run of `{name}` is writing there" in refused
        assert f"process {process} on {socket.gethostname()}" in refused
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    module = importlib.import_module(WHERE[name][0])
    work = getattr(module, WHERE[name][1])
    attempts = []

    def work_and_probe(*positional: object, **keywords: object) -> object:
        attempts.append(subprocess.run([sys.executable, "-c", LOCK, lock], cwd=ROOT, capture_output=True, check=False))
        return work(*positional, **keywords)

    monkeypatch.setattr(module, WHERE[name][1], work_and_probe)
    if name in ("gain", "rules", "ifeval", "turns"):
        assert command(name, *arguments[name]) == 0
    else:  # no data of the task, no rows of the bench: found after the lock is taken
        assert "another run" not in says_no(name, *arguments[name])
    assert attempts
    for attempt in attempts:
        assert f"LockHeldError: process {os.getpid()} on {socket.gethostname()}" in attempt.stderr.decode()


def test_another_command_may_write_to_the_same_folder(
    arguments: dict[str, list[object]], command: Callable[..., int], tmp_path: Path
) -> None:
    with held(tmp_path / "out" / ".rules.lock"):
        assert command("gain", *arguments["gain"]) == 0
