"""Helpers for tests of complete runs: configuration, a run against a scripted server, written files."""

import json
from pathlib import Path
from typing import Any

import yaml
from scripted_model import EIGHT, SEED
from scripted_server import Asked, Reply, Script, said, served

from train.sysgen.config import load_config
from train.sysgen.run import RunResult, run


def configuration(folder: Path, url: str, source: Path, **changes: Any) -> Path:
    path = folder / "config.yaml"
    settings = {
        "model": "m",
        "servers": [{"base_url": url, "concurrency": 16}],
        "data": {"sources": [{"path": str(source)}]},
        "generate": {"max_tokens": 512, "seed": SEED},
        "output_dir": str(folder / "out"),
    } | changes
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def run_file(path: Path) -> None:
    """Run a configuration file, in a process of its own."""
    run(load_config(path))


def run_with(script: Script, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[RunResult, list[Asked]]:
    """Run SYSGEN over these rows; return the result and the requests."""
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with served(script) as server:
        done = run(load_config(configuration(folder, server.url, source, **changes)))
        return done, list(server.asked)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def only_row(folder: Path) -> dict[str, Any]:
    (row,) = lines(folder / "out" / "data" / "rows.jsonl")
    return row


def only_reason(folder: Path) -> str:
    (row,) = lines(folder / "out" / "left_out.jsonl")
    return row["reason"]


def question(text: str = "question [1] of the same kind?", reply: str = "old answer", **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": reply}], **more}


def good_everything(asked: Asked) -> str:
    """Return the reply of a model without errors."""
    if asked.prompt.startswith("The next conversation"):
        return "<<Role>>You are a tester.<</Role>>"
    if "Judge for each of the eight" in asked.prompt:
        return "\n".join(f"<<{tag}>>: Good" for tag in EIGHT)
    return "Yes" if asked.prompt.startswith("An assistant was given") else "a fine new answer"


def saying(**changes: str) -> Script:
    """Return a script of `good_everything` with other replies for the named stages."""

    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        stage = {"<<Role>": "generate", "<<Role>>: Good": "verify", "Yes": "judge"}.get(text[:14], "answer")
        stage = "generate" if text.startswith("<<Role>>You") else stage
        return said(changes.get(stage, text))

    return script
