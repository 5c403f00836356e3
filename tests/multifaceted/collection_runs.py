"""Helpers for tests of complete runs: configuration, a run against a scripted server, written files."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from scripted_author import SEED, Author, expected, number_in, row_of
from scripted_server import Asked, Reply, Script, ScriptedServer, said, served

from train.multifaceted.collection.config import load_config
from train.multifaceted.collection.hierarchy import PreferencePlan, load_hierarchy
from train.multifaceted.collection.run import RunResult, run

OUTPUTS = ("data/rows.jsonl", "pairs/rows.jsonl", "left_out.jsonl")


def configuration(folder: Path, url: str, source: Path, **changes: Any) -> Path:
    path = folder / "config.yaml"
    stages = ("propose", "describe", "message", "answer")
    settings = {
        "model": "m",
        "servers": [{"base_url": url, "concurrency": 16}],
        "data": {"sources": [{"path": str(source)}]},
        **{stage: {"seed": SEED} for stage in stages},
        "output_dir": str(folder / "out"),
    } | changes
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def run_file(path: Path) -> None:
    """Run a configuration file, in a process of its own."""
    run(load_config(path))


def run_to_the_end(path: Path, server: ScriptedServer) -> None:
    """Run a configuration file twice; the second run asks nothing."""
    run_file(path)
    requests = len(server.asked)
    run_file(path)
    assert len(server.asked) == requests


def check_same_rows(folder: Path, other: Path) -> None:
    """Check that the rows, pairs and left-out rows of two runs are the same to the byte."""
    for name in OUTPUTS:
        assert (folder / "out" / name).read_bytes() == (other / "out" / name).read_bytes()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def author_of(count: int, sets: int = 3) -> Author:
    """Return an author that maps each sub-dimension of an instruction to its set."""
    plan = PreferencePlan(load_hierarchy(), sets, 42)
    set_of = {}
    for place, row in enumerate(expected(count).kept):
        number = number_in(next(turn["content"] for turn in row_of(row)["messages"] if turn["role"] == "user"))
        for which, planned in enumerate(plan.sets_of(place)):
            for draw in planned:
                set_of[number, (draw.sub.dimension, draw.sub.name)] = which
    return Author(set_of)


def run_with(script: Script, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[RunResult, list[Asked]]:
    """Run the collection over these rows; return the result and the requests."""
    source = write_rows(folder / "source.jsonl", rows)
    with served(script) as server:
        done = run(load_config(configuration(folder, server.url, source, **changes)))
        return done, list(server.asked)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def written(folder: Path, name: str = "data/rows.jsonl") -> list[dict[str, Any]]:
    return lines(folder / "out" / name)


def stage_of(asked: Asked) -> str:
    if asked.body["messages"][0]["role"] == "system":
        return "answer"
    sections = {"### Aspects": "propose", "### Preferences": "describe", "### Descriptions": "message"}
    return next((stage for section, stage in sections.items() if section in asked.prompt), "screen")


def mark_in(asked: Asked) -> str:
    """Return the instruction's mark, [7], which all replies about it repeat; the examples in prompts have none."""
    turns = asked.body["messages"]
    return "".join(re.findall(r"\[\d+\]", turns[-1]["content"])[:1])


def good_everything(asked: Asked) -> str:
    """Return the reply of a model without errors that never repeats itself."""
    stage, mark = stage_of(asked), mark_in(asked)
    if stage in ("propose", "describe"):
        wanted = asked.prompt.rpartition("\n### ")[2].splitlines()[1:]
        names = [line[2:].partition(",")[0] for line in wanted if line.startswith("- ")]
        return "\n".join(f"{name}: Kind {asked.number} for {number} {mark}." for number, name in enumerate(names))
    if stage == "screen":
        return "No."
    return f"You are helper {asked.number} {mark}." if stage == "message" else f"Answer {asked.number} {mark}."


def saying(**changes: Any) -> Script:
    """Return a script of `good_everything` with other replies for the named stages: a text, or a function of the request."""

    async def script(asked: Asked) -> Reply:
        change = changes.get(stage_of(asked), good_everything)
        reply = change if isinstance(change, str) else change(asked)
        return said(reply) if isinstance(reply, str) else reply

    return script
