"""Helpers of the bench's tests: rows, a judge that follows a plan, and the command in this process."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluate_processes import evaluate_script
from scripted_server import Asked, Reply, error, said

ROOT = Path(__file__).parents[2]
DIMENSIONS = ("style", "background_knowledge", "informativeness", "harmlessness")
FIRST_CONTACT = "Hi"
"""The prompt of the first contact with the judge's server, which is no judgement."""
Say = Callable[[int, int, int], Reply | str]
"""The judge's reply on (row, rubric) to the n-th identical request, from 0."""


def rubric(row: int, number: int) -> dict[str, Any]:
    grades = {str(grade): f"grade {grade} of rubric {row}.{number}" for grade in range(1, 6)}
    return {"criteria": f"Is criterion {row}.{number} met?", "score_descriptions": grades}


def bench_row(number: int, *, rubric_count: int = 4, **changes: Any) -> dict[str, Any]:
    """A row in the hub's columns; the words of its system message occur nowhere else."""
    preferences = [
        {"dimension": DIMENSIONS[which], "subdimension": f"sub {which}", "preference": "p", "description": "d"}
        for which in range(rubric_count)
    ]
    return {
        "source": ("Koala", "FLASK")[number % 2],
        "preference_set": preferences,
        "system": f'Zebra-{number} "speaks" like\nZebra-{number}.',
        "prompt": f"Question {number}, is it?",
        "reference_answer": f"Reference to {number}.",
        "rubrics": [rubric(number, which) for which in range(rubric_count)],
    } | changes


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def place_of(prompt: str) -> tuple[int, int]:
    """Row and rubric of a question to the judge."""
    row, number = prompt.split("Is criterion ")[1].split(" met?")[0].split(".")
    return int(row), int(number)


def judging(say: Say) -> Callable[[Asked], Any]:
    """A server whose model `judge` follows `say`, and whose other models answer with their name and the question."""
    times: Counter[str] = Counter()

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] != "judge":
            return said(f"{asked.body['model']} answers: {asked.prompt}")
        if asked.prompt == FIRST_CONTACT:
            return said("Feedback")
        time = times[asked.prompt]
        times[asked.prompt] += 1
        reply = say(*place_of(asked.prompt), time)
        return said(reply) if isinstance(reply, str) else reply

    return script


def too_long() -> Reply:
    return error(400, "too long a prompt")


def command(*arguments: str | Path) -> int:
    """Run scripts/evaluate.py bench in this process; the exit code."""
    try:
        return evaluate_script().main(["bench", *map(str, arguments)])
    except SystemExit as end:  # argparse's own
        return int(end.code or 0)
