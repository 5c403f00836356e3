"""scripts/evaluate.py: a second run of a command in the same folder is refused, with the process of the first."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = "class Rule:\n    check = staticmethod(lambda question, text: True)\n\nRULES = {'any': Rule}\n"

STOPPED = """
import os, signal, sys
from {module} import {name} as whole
import {module}
def stop(*arguments, **more):
    os.kill(os.getpid(), signal.SIGSTOP)
    return whole(*arguments, **more)
{module}.{name} = stop
import runpy
runpy.run_path("scripts/evaluate.py", run_name="__main__")
"""
"""A run of evaluate.py that stops itself (SIGSTOP) at this function."""


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
    short = ["--max-new-tokens", "2"]
    return {
        "gain": ["--model", tiny_chat_model, "--data", data, "--json", out / "gain.json"],
        "rules": ["--rules", rules, "--data", data, "--before", tiny_chat_model, "--after", out, *short],
        "ifeval": ["--model", tiny_chat_model, "--data", asked, "--output-dir", out, *short],
        "harness": ["--model", tiny_chat_model, "--tasks", "nosuch", "--include-path", tmp_path, "--output-dir", out],
        "bench": ["--model", "m", "--data", data, "--judge", "j", "--judge-server", "http://localhost:1/v1",
                  "--output-dir", out],
    }  # fmt: skip


WHERE = {
    "gain": ("train.system_gain.metric", "system_gain"),
    "rules": ("train.evaluation.models.responses", "generate_answers"),
    "ifeval": ("train.evaluation.models.responses", "generate_answers"),
    "harness": ("train.evaluation.harness", "task_names"),
    "bench": ("train.multifaceted.bench.rows", "read_bench"),
}


@contextmanager
def stopped(name: str, arguments: list[object]) -> Iterator[int]:
    """Start the command, yield its process id while it is stopped, and kill it at the end."""
    module, function = WHERE[name]
    run = subprocess.Popen(
        [sys.executable, "-c", STOPPED.format(module=module, name=function), name, *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _, status = os.waitpid(run.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield run.pid
    finally:
        run.kill()
        run.wait()


@pytest.mark.parametrize("name", WHERE)
def test_a_second_run_is_refused_and_a_killed_run_leaves_no_lock(
    name: str,
    arguments: dict[str, list[object]],
    says_no: Callable[..., str],
    command: Callable[..., int],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    with stopped(name, arguments[name]) as process:
        before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
        refused = says_no(name, *arguments[name])
        assert f"{out}: another run of `{name}` is writing there" in refused
        assert f"process {process} on {socket.gethostname()}" in refused
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    if name in ("gain", "rules", "ifeval"):
        assert command(name, *arguments[name]) == 0
    else:  # no such task and no such rows, which is found behind the lock
        assert "another run" not in says_no(name, *arguments[name])


def test_another_command_may_write_to_the_same_folder(
    arguments: dict[str, list[object]], command: Callable[..., int]
) -> None:
    with stopped("rules", arguments["rules"]):
        assert command("gain", *arguments["gain"]) == 0
