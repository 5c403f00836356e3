"""Rows and recipes of small runs on several processes."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_words import WORDS

EVALUATED_AT_EACH_STEP = {
    "learning_rate": 0.02,
    "num_train_epochs": ...,
    "max_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_on_start": True,
    "save_strategy": "steps",
    "save_steps": 1,
}
"""Section `training` of a run with evaluations and checkpoints, for the fixture `recipe_file`."""


@dataclass(frozen=True)
class Kind:
    """Processes and configuration of a run."""

    name: str
    processes: int = 1
    config: str | None = None
    adapter: bool = False


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(
    path: Path, count: int, seed: int, *, system: int = 9, user: int = 6, answers: tuple[int, ...] = (1, 5, 30, 60)
) -> Path:
    """Write conversations of random words.

    Args:
        path: the file to write.
        count: number of rows.
        seed: seed of the words.
        system: largest number of words in a system message.
        user: words in a user turn.
        answers: numbers of words of which each answer has one.
    """
    rng = random.Random(seed)
    text = lambda words: " ".join(rng.choice(WORDS.split()) for _ in range(words))  # noqa: E731
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(count):
            turns = [("system", rng.randint(1, system)), ("user", user), ("assistant", rng.choice(answers))]
            lines.write(json.dumps({"messages": [{"role": role, "content": text(n)} for role, n in turns]}) + "\n")
    return path


def write_recipe(
    path: Path, model: Path, rows: Path, run: Path, *, data: dict[str, Any], training: dict[str, Any], **sections: Any
) -> Path:
    """Write a recipe that saves checkpoints, with these sections merged into it. JSON is YAML."""
    content = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "chat": {"template": "chatml"},
        "data": {"sources": [{"path": str(rows)}], "max_length": 256, **data},
        "training": {
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 1e-3,
            "per_device_train_batch_size": 1,
            "logging_steps": 1,
            "save_strategy": "steps",
            **training,
        },
        "output_dir": str(run),
        **sections,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def once(train: Callable[[Kind], Path]) -> Callable[[Kind], Path]:
    """Return a function that trains each kind at most once: the folder of its run."""
    runs: dict[Kind, Path] = {}

    def run(kind: Kind) -> Path:
        if kind not in runs:
            runs[kind] = train(kind)
        return runs[kind]

    return run
