"""lm-evaluation-harness on a checkpoint: the trained template, the figures of a plain loop, errors, and kill -9."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness_tasks import choice_likelihoods, multiple_choice

from train.evaluation.task_groups import SYSGEN, task_names

ROOT = Path(__file__).parents[2]
WORDS = ["river", "stone", "cloud", "amber", "seven", "quiet", "window", "paper", "north", "candle", "orbit", "maple"]
DOCUMENTS = 60


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of 60 questions with three choices, and a task without data."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(1)
    with (folder / "rivers.jsonl").open("w", encoding="utf-8") as lines:
        for _ in range(DOCUMENTS):
            question = "Which comes after " + " ".join(rng.sample(WORDS, 4)) + "?"
            choices = [" ".join(rng.sample(WORDS, count)) for count in (1, 2, 3)]
            lines.write(json.dumps({"question": question, "choices": choices, "answer": rng.randrange(3)}) + "\n")
    task = multiple_choice("rivers", folder / "rivers.jsonl") | {"metadata": {"version": 1.0}}
    lost = task | {"task": "lost", "dataset_kwargs": {"data_files": {"test": str(folder / "nowhere.jsonl")}}}
    says = task | {
        "task": "says",
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [], "do_sample": False, "temperature": 0.0, "max_gen_toks": 6},
    }
    del says["doc_to_choice"]
    for item in (task, lost, says):
        (folder / f"{item['task']}.yaml").write_text(yaml.safe_dump(item), encoding="utf-8")
    return folder


def plain_loop(model_folder: Path, tasks: Path, system: str | None) -> list[float]:
    """Per question, 1 if the right choice is the likeliest."""
    documents = [json.loads(line) for line in (tasks / "rivers.jsonl").read_text(encoding="utf-8").splitlines()]
    questions = [(document["question"], document["choices"]) for document in documents]
    likelihoods = choice_likelihoods(model_folder, questions, system)
    return [
        float(max(range(3), key=of_question.__getitem__) == document["answer"])
        for of_question, document in zip(likelihoods, documents, strict=True)
    ]


@pytest.mark.parametrize("system", [None, "Speak like a river of amber."])
def test_the_trained_template_and_the_figures(
    command: Callable[..., int], tiny_chat_model: Path, tasks: Path, tmp_path: Path, system: str | None
) -> None:
    expected = plain_loop(tiny_chat_model, tasks, system)
    system_options = ("--system-instruction", system) if system else ()
    arguments = (
        "harness",
        "--model",
        tiny_chat_model,
        "--tasks",
        "rivers",
        "--include-path",
        tasks,
        "--output-dir",
        tmp_path,
    )
    assert command(*arguments, *system_options) == 0
    rows = [json.loads(line) for line in (tmp_path / "harness_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["scores"]["acc"] for row in rows] == expected
    assert 0 < sum(expected) < DOCUMENTS
    record = json.loads((tmp_path / "harness.json").read_text(encoding="utf-8"))
    [score] = record["scores"]
    mean = sum(expected) / DOCUMENTS
    stderr = (sum((item - mean) ** 2 for item in expected) / (DOCUMENTS - 1) / DOCUMENTS) ** 0.5
    assert (score["task"], score["metric"], score["of"], score["few_shot"]) == ("rivers", "acc", DOCUMENTS, 0)
    assert (score["value"], score["stderr"]) == (pytest.approx(mean), pytest.approx(stderr))
    # Documents are right or wrong: at both ends, as true shares, the mean is 1.96 standard errors away.
    assert score["low"] < mean < score["high"]
    for end in (score["low"], score["high"]):
        assert abs(mean - end) / (end * (1 - end) / DOCUMENTS) ** 0.5 == pytest.approx(1.96, abs=1e-4)
    assert record["options"]["system_instruction"] == system
    assert (record["options"]["template"], record["options"]["system_role"]) == (None, "native")
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert f"| rivers | acc | 0 | {DOCUMENTS} | {mean:.4f} [" in report
    assert (system or "no system message") in report


KILLED = """
import os, signal, sys
from lm_eval.models.huggingface import HFLM
left, whole = int(sys.argv.pop(1)), HFLM._model_call
def until_killed(self, *arguments, **options):
    global left
    left -= 1
    if left < 0:
        self.cache_hook.dbdict.commit()  # the cache writes in a thread of its own: what it was given until now
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(self, *arguments, **options)
HFLM._model_call = until_killed
import runpy
runpy.run_path("scripts/evaluate.py", run_name="__main__")
"""


def test_a_killed_run_scores_nothing_twice(
    command: Callable[..., int], tiny_chat_model: Path, tasks: Path, tmp_path: Path
) -> None:
    """180 requests in batches of 16, killed at the fourth batch: 48 are kept and not written again."""
    out = tmp_path / "out"
    arguments = ("harness", "--model", tiny_chat_model, "--tasks", "rivers", "--include-path", tasks, "--output-dir")
    killed = [sys.executable, "-W", "ignore", "-c", KILLED, "3", *map(str, arguments), str(out)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}  # what is killed leaves its temporary files
    done = subprocess.run(killed, cwd=ROOT, capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL
    [file] = (out / "harness_requests").glob("*.db")

    def written() -> set[tuple]:
        with sqlite3.connect(file) as connection:
            return set(connection.execute("SELECT rowid, key, value FROM unnamed").fetchall())

    before = written()
    assert len(before) == 48
    for folder in (out, tmp_path / "whole"):
        assert command(*arguments, folder) == 0
    # One that is written anew gets another rowid.
    assert before < written()
    assert len(written()) == 3 * DOCUMENTS
    for name in ("harness.json", "harness_rows.jsonl"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_generated_answers_are_kept(
    command: Callable[..., int], tiny_chat_model: Path, tasks: Path, tmp_path: Path
) -> None:
    arguments = ("harness", "--model", tiny_chat_model, "--tasks", "says", "--include-path", tasks, "--limit", "10")
    written = []
    for _ in range(2):
        assert command(*arguments, "--output-dir", tmp_path) == 0
        [file] = (tmp_path / "harness_requests").glob("*.db")
        with sqlite3.connect(file) as connection:
            written.append(connection.execute("SELECT rowid, key, value FROM unnamed").fetchall())
    assert len(written[0]) == 10
    assert written[0] == written[1]  # one that is written anew gets another rowid
    [score] = json.loads((tmp_path / "harness.json").read_text(encoding="utf-8"))["scores"]
    assert (score["task"], score["metric"], score["of"]) == ("says", "exact_match", 10)
    assert "not comparable with published figures" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_user_errors(says_no: Callable[..., str], tiny_chat_model: Path, tasks: Path, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        return says_no("harness", "--model", tiny_chat_model, "--output-dir", tmp_path, *arguments)

    lost = refused("--tasks", "rivers", "lost", "--include-path", tasks)
    assert lost.startswith("--tasks lost: its data cannot be loaded: FileNotFoundError")
    assert "no such folder" in refused("--tasks", "rivers", "--include-path", tmp_path / "nowhere")
    assert "argument --limit: '0' must be an integer >= 1" in refused("--tasks", "rivers", "--limit", "0")
    assert "--output-dir FOLDER" in says_no("harness", "--model", "some/model", "--tasks", "rivers")
    deaf = tmp_path / "deaf.jinja"
    deaf.write_text(
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8"
    )
    # The harness itself would go on without the system message, with a warning.
    assert "loses system messages" in refused(
        "--tasks", "rivers", "--include-path", tasks, "--template", deaf, "--system-instruction", "Be a river."
    )


def test_sysgen_stands_for_eight_tasks_and_missing_data_is_an_error(
    says_no: Callable[..., str], tiny_chat_model: Path, tmp_path: Path
) -> None:
    """An unknown name is reported first; nothing can be downloaded here, so the first of the eight is reported next."""
    assert len(SYSGEN) == 8
    assert task_names(["sysgen", "arc_easy", "mmlu"]) == [*SYSGEN.values(), "arc_easy"]
    arguments = ("harness", "--model", tiny_chat_model, "--output-dir", tmp_path, "--tasks")
    said = says_no(*arguments, "sysgen")
    assert said.startswith("--tasks mmlu: its data cannot be loaded: ")
    assert "arc_challenge" in says_no(*arguments, "arc_chalenge")
