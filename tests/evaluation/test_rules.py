"""scripts/evaluate.py rules: every figure of the report, counted again from the answers file."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = """
from dataclasses import dataclass
from typing import Callable

@dataclass(frozen=True)
class Rule:
    check: Callable[[str, str], bool]

RULES = {"long": Rule(lambda question, text: len(text) > 12), "never": Rule(lambda question, text: False)}
"""


@pytest.fixture
def evaluated(tiny_chat_model: Path, tmp_path: Path) -> tuple[Path, list[dict]]:
    """The folder of the model "after" (the same model, copied) and the rows asked."""
    after = tmp_path / "after"
    after.mkdir()
    for path in tiny_chat_model.iterdir():
        (after / path.name).write_bytes(path.read_bytes())
    (after / "report.md").write_text("# a run\n\nof before\n", encoding="utf-8")
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    rows = [
        {
            "messages": [{"role": role, "content": f"river {row}"} for role in ("system", "user", "assistant")],
            "rule": "long" if row % 3 else "never",
            "held_out": "rule" if row > 5 else "wording",
        }
        for row in range(8)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return after, rows


def test_adherence_equals_a_count_of_the_answers(
    evaluated: tuple[Path, list[dict]], tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    after, rows = evaluated
    arguments = [
        "--rules",
        tmp_path / "rules.py",
        "--data",
        tmp_path / "rows.jsonl",
        "--before",
        tiny_chat_model,
        "--after",
        after,
    ]
    for _ in range(2):  # a second time the section is written anew, not once more
        assert command("rules", *arguments, "--max-new-tokens", "8", "--batch-size", "3") == 0
    answers = [json.loads(line) for line in (after / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["messages"] for answer in answers] == [row["messages"] for row in rows]
    assert all(answer["answers"][0] == answer["answers"][1] for answer in answers)
    for answer in answers:
        assert answer["obeys"] == [answer["rule"] == "long" and len(text) > 12 for text in answer["answers"]]
    figures = json.loads((after / "adherence.json").read_text(encoding="utf-8"))
    for kind in ("wording", "rule"):
        for rule in ("long", "never"):
            asked = [answer for answer in answers if (answer["held_out"], answer["rule"]) == (kind, rule)]
            obeyed = sum(answer["obeys"][0] for answer in asked)
            assert figures[kind][rule] == {"rows": len(asked), "before": obeyed, "after": obeyed}
    assert figures["asked"]["max_new_tokens"] == 8
    report = (after / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# a run\n\nof before\n\n## Does it follow")
    assert report.count("## Does it follow") == 1
    wording = [answer["obeys"][1] for answer in answers if answer["held_out"] == "wording"]
    assert f"{sum(wording) / len(wording):.1%} after" in report
    assert (after / "adherence.png").read_bytes().startswith(b"\x89PNG")
    # Six questions under wordings; of `never` there are two, and of each rule that was never trained one or two.
    share = sum(wording) / 6
    of_all = figures["intervals"]["wording"]["all rules"]["after"]
    assert (of_all["mean"], of_all["groups"]) == (pytest.approx(share), 6)
    for end in (of_all["low"], of_all["high"]):  # at its ends, as true shares, this one is 1.96 standard errors away
        assert (share - end) ** 2 * 6 == pytest.approx(1.96**2 * end * (1 - end), abs=1e-3)
    assert of_all["low"] < of_all["high"]
    assert f"| all rules | 6 | {100 * share:.1f} % [{100 * of_all['low']:.1f}, {100 * of_all['high']:.1f}] | " in report
    assert "| never | 2 | 0.0 % (n = 2) | 0.0 % (n = 2) |" in report
    assert "(n = ...): too few questions for an interval, which needs at least 6." in report


@pytest.fixture
def refused(
    command: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run the command in a folder and return its message after `error:`; only a usage line may precede it."""

    def run(folder: Path, *arguments: str | Path) -> str:
        monkeypatch.chdir(folder)
        capsys.readouterr()
        assert command("rules", *arguments) == 2
        *usage, error = capsys.readouterr().err.splitlines()
        assert not usage or usage[0].startswith("usage: ")
        assert error.startswith("error: ")
        return error.removeprefix("error: ")

    return run


def test_missing_files_are_errors(refused: Callable[..., str], tmp_path: Path) -> None:
    command = ["--rules", "no.py", "--data", "no.jsonl", "--before", "a", "--after", "b"]
    assert refused(tmp_path, *command) == f"--rules no.py: cannot be read: there is no no.py in {tmp_path}."
    (tmp_path / "no.py").write_text(RULES, encoding="utf-8")
    (tmp_path / "nos.jsonl").mkdir()
    error = f"--data no.jsonl: cannot be read: there is no no.jsonl in {tmp_path}. Did you mean nos.jsonl?"
    assert refused(tmp_path, *command) == error
    assert refused(tmp_path, *command[:-2]) == "the following arguments are required: --after"


def test_invalid_numbers_are_errors(refused: Callable[..., str], tmp_path: Path) -> None:
    command = ["--rules", "no.py", "--data", "no.jsonl", "--before", "a", "--after", "b"]
    assert "'0' must be an integer >= 1" in refused(tmp_path, *command, "--max-new-tokens", "0")
    assert "'0' must be an integer >= 1" in refused(tmp_path, *command, "--batch-size", "0")


def test_a_file_that_can_not_be_written_is_an_error(
    refused: Callable[..., str], evaluated: tuple[Path, list[dict]], tiny_chat_model: Path, tmp_path: Path
) -> None:
    """Rows may hold a Unicode line separator, which ends no line of a jsonl file."""
    after, rows = evaluated
    rows[0]["messages"][1]["content"] = "two\u2028lines"
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n", encoding="utf-8")
    (after / "adherence.json").mkdir()
    command = ["--rules", "rules.py", "--data", "rows.jsonl", "--before", tiny_chat_model, "--after", after]
    assert refused(tmp_path, *command, "--max-new-tokens", "2") == f"{after}: cannot be written: Is a directory"


GOOD = {
    "messages": [{"role": role, "content": "river"} for role in ("system", "user", "assistant")],
    "rule": "long",
    "held_out": "rule",
}
BAD_DATA = {
    "--data rows.jsonl: holds no rows": "\n",
    "--data rows.jsonl:2: not valid JSON": json.dumps(GOOD) + "\n{",
    "--data rows.jsonl: not UTF-8": b"\xff\n",
    "--data rows.jsonl:1: found a list, not an object": "[]",
    "--data rows.jsonl:1: there is no `rule`": json.dumps({key: GOOD[key] for key in ("messages", "held_out")}),
    "--data rows.jsonl:1: `rule` is 'lon'. Allowed: long, never": json.dumps(GOOD | {"rule": "lon"}),
    "--data rows.jsonl:1: `held_out` must be 'wording' or 'rule' (found \"x\")": json.dumps(GOOD | {"held_out": "x"}),
    "--data rows.jsonl:1: `messages.0` is a str, not an object": json.dumps(GOOD | {"messages": ["a", "b", "c"]}),
    "--data rows.jsonl:1: `messages` must be a system message, a user message and an answer": json.dumps(
        GOOD | {"messages": GOOD["messages"][1:]}
    ),
}


@pytest.mark.parametrize("words", BAD_DATA)
def test_invalid_rows_are_an_error_that_names_the_line(refused: Callable[..., str], words: str, tmp_path: Path) -> None:
    text = BAD_DATA[words]
    (tmp_path / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    error = refused(tmp_path, "--rules", "rules.py", "--data", "rows.jsonl", "--before", "a", "--after", "b")
    assert error.startswith(words)


def test_a_byte_order_mark_is_skipped(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    error = refused(tmp_path, "--rules", "rules.py", "--data", "rows.jsonl", "--before", "nowhere", "--after", "b")
    # so the rows were read
    assert error == f"--before nowhere: there is no such folder: there is no nowhere in {tmp_path}."


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rules = {}", "holds no RULES"),
        ("RULES = {}", "holds no RULES"),
        ("RULES = {'long': 3}", "RULES['long'] has no `check`"),
        ("import nosuch", "ModuleNotFoundError: No module named 'nosuch'"),
        ("RULES = {", "SyntaxError"),
    ],
)
def test_a_file_without_rules_is_an_error(refused: Callable[..., str], text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD), encoding="utf-8")
    (tmp_path / "rules.py").write_text(text, encoding="utf-8")
    error = refused(tmp_path, "--rules", "rules.py", "--data", "rows.jsonl", "--before", "a", "--after", "b")
    assert error.startswith("--rules rules.py: ")
    assert words in error


def test_a_folder_without_a_model_is_an_error_before_the_first_answer(
    refused: Callable[..., str], tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD), encoding="utf-8")
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    command = ["--rules", "rules.py", "--data", "rows.jsonl", "--before", tiny_model, "--after"]
    missing = f"--after emtpy: there is no such folder: there is no emtpy in {tmp_path}. Did you mean empty?"
    assert refused(tmp_path, *command, "emtpy") == missing
    assert "--after empty: cannot be loaded: " in refused(tmp_path, *command, "empty")
    shutil.copy(tiny_model / "config.json", tmp_path / "empty")
    command[command.index(tiny_model)] = "empty"
    assert refused(tmp_path, *command, tiny_model).startswith("--before or --after empty: empty can't be loaded: ")


@pytest.mark.parametrize(
    "asked",
    [
        ("gain", "--model", "m", "--data", "d"),
        ("ifeval", "--model", "m", "--data", "d"),
        ("bench", "--model", "m", "--judge", "j"),
        ("compare", "a", "b"),
    ],
    ids=lambda asked: asked[0],
)
@pytest.mark.parametrize("seed", ["-1", "0.5", "x"])
def test_an_invalid_seed_is_refused_before_data_is_read(
    asked: tuple[str, ...], seed: str, says_no: Callable[..., str]
) -> None:
    """numpy refuses seeds below 0, but only after everything is computed."""
    error = says_no(*asked, "--seed", seed)
    assert re.fullmatch(
        rf"(argument --seed: '{seed}' must be an integer >= 0)|(--seed {seed}: found '?{seed}'?\. Allowed: .*)", error
    )
