"""scripts/evaluate.py turns --sysbench: requests, figures, files, errors, and `compare`."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from scripted_server import Asked, Reply, error, said, served
from sysbench_data import conversation, write_file

from train.evaluation.turns.sysbench_judging import NO_VERDICT

CRITERION = re.compile(r"^(\d+)\. Criterion (\d+)\.(\d+)\.\d+ is met\.$", re.MULTILINE)
Place = tuple[int, int]
"""Conversation and turn, the latter from 1."""
Command = Callable[..., int]


def judge_reply(numbers: Sequence[str], unmet: Sequence[str] = ()) -> str:
    verdicts = {number: "no" if number in unmet else "yes" for number in numbers}
    return json.dumps({"reasons": "...", "verdicts": verdicts})


def scripted(
    unmet: dict[Place, Sequence[str]] | None = None,
    replies: dict[Place, Sequence[Reply | str]] | None = None,
    refused: Sequence[Place] = (),
) -> Callable[[Asked], Any]:
    """Return a server with a model that answers all turns but `refused`, and a judge.

    Args:
        unmet: the criteria that the judge finds not met.
        replies: the judge's first replies on a turn, the last of which it repeats.
        refused: turns that the model's server refuses.
    """
    asked_about: Counter[Place] = Counter()

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge":
            matches = CRITERION.findall(asked.prompt)
            if not matches:
                return said("Hi")  # first contact
            place = int(matches[0][1]), int(matches[0][2])
            asked_about[place] += 1
            if replies and place in replies:
                reply = replies[place][min(asked_about[place], len(replies[place])) - 1]
                return said(reply) if isinstance(reply, str) else reply
            return said(judge_reply([number for number, _, _ in matches], (unmet or {}).get(place, ())))
        number, turn = map(int, re.findall(r"\d+", asked.prompt))
        if (number, turn) in refused:
            return error(400, "the prompt is refused")
        return said(f"{asked.body['model']} answers {number}.{turn}")

    return script


def measure(command: Command, folder: Path, url: str, *more: str | Path, count: int = 7, model: str = "m") -> int:
    data = write_file(folder / "data.json", [conversation(number) for number in range(count)])
    options = ("--model", model, "--server", url, "--sysbench", data, "--judge", "judge", "--judge-server", url)
    return command("turns", *options, "--output-dir", folder / model, *more)


def results(folder: Path, model: str = "m") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    lines = (folder / model / "sysbench_rows.jsonl").read_text("utf-8").splitlines()
    return json.loads((folder / model / "sysbench.json").read_text("utf-8")), [json.loads(line) for line in lines]


NO_GOOD: dict[str, Any] = {
    "unmet": {(1, 3): ["1"], (6, 1): ["1", "2"]},
    "replies": {
        (2, 4): ["hm"],
        (3, 2): [error(400, "too long a prompt")],
        (4, 5): [judge_reply(["1"]), judge_reply(["1", "2"])],
    },
    "refused": [(5, 3)],
}
"""Two conversations break, at turns 3 and 1. One turn's verdict is unparsable, one's is refused, one's comes at the
second try. One conversation has no answer from turn 3 on. The criteria of a turn are 2, 1, 2, 1, 2."""


def test_a_scripted_judge_gives_the_figures_of_hand_calculation(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(scripted(**NO_GOOD), models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url) == 0
        shown = capsys.readouterr().out
        asked = len(server.asked)
        assert measure(command, tmp_path, server.url) == 0
        again = [request.prompt.splitlines()[0] for request in server.asked[asked:]]
    # Of a second run: the first contact with the judge, the prompt without an answer, the judgement without a reply.
    assert [text[:20] for text in again] == ["Hi", "Conversation 5, user", "You check one answer"]
    record, rows = results(tmp_path)
    # Met, of all: conversations 0 to 6 in turn.
    assert (record["csr"]["mean"], record["csr"]["of"]) == (pytest.approx((8 + 7 + 7 + 7 + 8 + 3 + 6) / 49), 49)
    assert (record["isr"]["mean"], record["isr"]["of"]) == (pytest.approx((5 + 4 + 4 + 4 + 5 + 2 + 4) / 30), 30)
    # Runs of 5, 2, 5 and 0 turns; conversations 2, 3 and 5 have none.
    assert (record["ssr"]["mean"], record["ssr"]["of"]) == (pytest.approx((5 + 2 + 5 + 0) / 5 / 4), 4)
    assert [point["mean"] for point in record["holds_through"]] == pytest.approx([3 / 4, 3 / 4, 2 / 4, 2 / 4, 2 / 4])
    assert record["half"]["turn"] == 3
    assert [point["of"] for point in record["isr_by_turn"]] == [7, 6, 6, 5, 6]
    assert [point["mean"] for point in record["isr_by_turn"]] == pytest.approx([6 / 7, 1, 5 / 6, 1, 1])
    dependent, parallel = (record["by_rounds"][name] for name in ("dependent", "parallel"))
    assert (dependent["ssr"]["mean"], dependent["ssr"]["of"]) == (pytest.approx(2 / 5), 1)
    assert (parallel["ssr"]["mean"], parallel["ssr"]["of"]) == (pytest.approx((5 + 5 + 0) / 5 / 3), 3)
    aligned, misaligned = (record["by_alignment"][name]["isr"] for name in ("aligned", "misaligned"))
    assert (aligned["mean"], aligned["of"]) == (pytest.approx(17 / 18), 18)
    assert (misaligned["mean"], misaligned["of"]) == (pytest.approx(11 / 12), 12)
    missing = record["missing"]
    assert missing["endings"] == {"ended": 32, "no answer": 1, "not asked": 2}
    assert (missing["turns_without_answer"], missing["turns_without_verdict"]) == (3, 5)
    assert missing["conversations_without_run"] == 3
    judge = missing["judge"]
    assert (judge["judgements"], judge["missing"]) == (32, {"unparsable": 1, "no answer": 1})
    assert (judge["replies"], judge["replies_without_verdict"]) == (35, {NO_VERDICT: 5})
    assert len(rows) == 35
    missing = (
        "5 turns have no verdict and are left out: 1 no answer, 2 not asked, 1 unparsable, 1 no answer of the judge"
    )
    assert f"warning: {missing} (reasons: report.md). The same command requests again what got no answer." in shown
    for text in (shown, (tmp_path / "m" / "report.md").read_text("utf-8")):
        assert "| every turn so far holds | 75.0 % (n = 4) |" in text
        assert "On average the first 3.00 of 5 turns hold without a break" in text
        assert "Judgements missing: 2 of 32 (1 unparsable, 1 no answer); 5 of 35 answers of the judge" in text
        assert "too long a prompt" in text
        assert "the prompt is refused" in text
    assert (tmp_path / "m" / "sysbench.png").read_bytes().startswith(b"\x89PNG")


def test_every_figure_is_that_of_a_plain_loop_over_the_rows(command: Command, tmp_path: Path) -> None:
    with served(scripted(**NO_GOOD), models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url) == 0
    record, rows = results(tmp_path)

    def csr(rows: list[dict[str, Any]], type: str | None = None) -> float:
        criteria = [each for row in rows for each in row["criteria"] if type in (None, each["type"])]
        return fmean(each["met"] for each in criteria if each["met"] is not None)

    def isr(rows: list[dict[str, Any]]) -> float:
        return fmean(all(each["met"] for each in row["criteria"]) for row in rows if row["holds"] is not None)

    def ssr(rows: list[dict[str, Any]]) -> float:
        runs = []
        for id in {row["system_id"] for row in rows}:
            holds = [row["holds"] for row in rows if row["system_id"] == id]
            if None not in holds:
                runs.append(holds.index(False) if False in holds else 5)
        return fmean(runs) / 5

    assert (record["csr"]["mean"], record["isr"]["mean"]) == (pytest.approx(csr(rows)), pytest.approx(isr(rows)))
    assert record["ssr"]["mean"] == pytest.approx(ssr(rows))
    for name, value in (("dependent", True), ("parallel", False)):
        of_rounds = [row for row in rows if row["dependent"] is value]
        measured = record["by_rounds"][name]
        assert [measured[key]["mean"] for key in ("csr", "isr", "ssr")] == pytest.approx(
            [csr(of_rounds), isr(of_rounds), ssr(of_rounds)]
        )
    for name, value in (("aligned", "align"), ("misaligned", "misalign")):
        selected = [row for row in rows if row["alignment"] == value]
        assert record["by_alignment"][name]["isr"]["mean"] == pytest.approx(isr(selected))
    for type, of_type in record["by_type"].items():
        assert of_type["csr"]["mean"] == pytest.approx(csr(rows, type))
    for turn, point in enumerate(record["isr_by_turn"], 1):
        assert point["mean"] == pytest.approx(isr([row for row in rows if row["turn"] == turn]))


@pytest.mark.parametrize(("history", "earlier"), [("own", "m answers 0."), ("reference", "Reference 0.")])
def test_model_and_judge_see_the_same_history(command: Command, tmp_path: Path, history: str, earlier: str) -> None:
    with served(scripted(), models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url, "--history", history, count=1) == 0
    bodies = [asked.body for asked in server.asked]
    prompts = sorted((body["messages"] for body in bodies if body["model"] == "m"), key=len)
    assert [len(messages) for messages in prompts] == [2, 4, 6, 8, 10]
    for messages in prompts:
        assert messages[0] == {"role": "system", "content": "System message 0."}
        answers = [message["content"] for message in messages if message["role"] == "assistant"]
        assert answers == [f"{earlier}{turn}" + "." * (history == "reference") for turn in range(1, len(answers) + 1)]
    judged = sorted((body["messages"][0]["content"] for body in bodies if body["model"] == "judge"), key=len)[1:]
    for turn, prompt in enumerate(judged, 1):
        assert [earlier + str(number) in prompt for number in range(1, 5)] == [number < turn or (
            number == turn and history == "own") for number in range(1, 5)]  # fmt: skip
        assert f"### The answer to be checked\nm answers 0.{turn}\n" in prompt
    assert results(tmp_path)[0]["history"] == history


def test_only_the_first_conversations_are_measured(command: Command, tmp_path: Path) -> None:
    with served(scripted(), models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url, "--conversations", "2") == 0
    record, rows = results(tmp_path)
    assert (record["data"]["conversations"], record["data"]["of"]) == (2, 7)
    assert {row["system_id"] for row in rows} == {0, 1}
    assert "(the first 2 of 7: not the complete set)" in (tmp_path / "m" / "report.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge-server", "http://127.0.0.1:1/v1"), "error: --sysbench: a judge decides there. Add --judge NAME."),
        (("--judge", "j"), "error: --sysbench: a judge decides there. Add --judge-server URL."),
        (
            ("--judge", "j", "--judge-server", "http://127.0.0.1:1/v1", "--judge-key-variable", "NO_SUCH_KEY"),
            "needs a key: set the environment variable NO_SUCH_KEY",
        ),
        (
            ("--judge", "j", "--judge-server", "http://127.0.0.1:1/v1", "--judge-extra", '{"temperature": 1}'),
            "error: --judge-extra: `temperature`",
        ),
    ],
)
def test_an_unusable_judge_is_refused_before_the_model_answers(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    data = write_file(tmp_path / "data.json", [conversation(0)])
    with served(scripted(), models=["m", "judge"]) as server:
        asked = ("--model", "m", "--server", server.url, "--sysbench", data, "--output-dir", tmp_path / "m")
        assert command("turns", *asked, *options) == 2
        assert not server.asked
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sysbench", "data.json", "--turns", "3"), "error: --turns: only the built-in conversations have that."),
        (("--sysbench", "data.json", "--no-gain"), "error: --no-gain: only the built-in conversations have that."),
        (("--judge", "j"), "error: --judge: a program judges the built-in conversations. Leave it out, or name"),
        (("--retries", "1"), "error: --retries: a program judges the built-in conversations."),
    ],
)
def test_options_of_the_other_conversations_are_refused(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert command("turns", "--model", tmp_path, "--output-dir", tmp_path / "out", *options) == 2
    assert capsys.readouterr().err.startswith(message)
    assert not (tmp_path / "out").exists()


def test_a_judge_that_cannot_be_reached_is_found_before_the_model_answers(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_file(tmp_path / "data.json", [conversation(0)])
    with served(scripted(), models=["m", "judge"]) as server:
        asked = ("--model", "m", "--server", server.url, "--sysbench", data, "--output-dir", tmp_path / "m")
        judge = ("--judge", "j", "--judge-server", "http://127.0.0.1:9/v1", "--wait-for-server", "0s")
        assert command("turns", *asked, *judge) == 2
        assert not [request for request in server.asked if request.prompt]
    assert "127.0.0.1:9" in capsys.readouterr().err


def test_no_answer_at_all_and_no_judgement_at_all_are_errors(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(scripted(refused=[(0, 1), (1, 1)]), models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url, count=2) == 2
    message = capsys.readouterr().err
    assert "error: --model m: no turn got an answer: " in message
    assert "the prompt is refused" in message
    places = [(number, turn) for number in range(2) for turn in range(1, 6)]
    refusals = scripted(replies={place: [error(400, "no judging here")] for place in places})
    with served(refusals, models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url, count=2) == 2
    message = capsys.readouterr().err
    assert "error: --judge judge: none of the 10 judgements has a verdict: " in message
    assert "no judging here" in message
    assert not (tmp_path / "m" / "sysbench.json").exists()


def test_a_judge_without_verdicts_is_a_warning(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [(number, turn) for number in range(2) for turn in range(1, 6)]
    with served(scripted(replies={place: ["hm"] for place in places}), models=["m", "judge"]) as server:
        assert measure(command, tmp_path, server.url, "--retries", "0", count=2) == 0
    shown = capsys.readouterr().out
    assert "warning: --judge judge: 10 of 10 verdicts could not be read" in shown
    assert "Use a judge that replies with the JSON object" in shown
    record = results(tmp_path)[0]
    assert [record[name] for name in ("csr", "isr", "ssr", "half")] == [None] * 4


def test_compare_pairs_turns_and_conversations_that_both_models_have(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, unmet in (("a", {(number, 3): ["2"] for number in range(6)}), ("b", {(0, 2): ["1"]})):
        replies: dict[Place, Sequence[Reply | str]] = {(6, 1): ["hm"]} if model == "b" else {}
        with served(scripted(unmet=unmet, replies=replies), models=[model, "judge"]) as server:
            assert measure(command, tmp_path, server.url, model=model) == 0
    assert command("compare", tmp_path / "a", tmp_path / "b", "--details") == 0
    shown = capsys.readouterr().out
    compared = json.loads((tmp_path / "b" / "compare.json").read_text("utf-8"))["measures"]
    measures = {each["measure"]: each for each in compared}
    # A breaks at turn 3 of conversations 0 to 5; B at turn 2 of 0, and has no verdict on turn 1 of 6.
    assert measures["criteria met (CSR)"]["rows"] == measures["turns that hold (ISR)"]["rows"] == 34
    assert measures["criteria met (CSR)"]["paired"]["mean"] == pytest.approx((6 - 1) / (56 - 2))
    assert measures["turns that hold (ISR)"]["paired"]["mean"] == pytest.approx((6 - 1) / 34)
    ssr = measures["turns held without a break (SSR)"]
    assert (ssr["rows"], ssr["paired"]["mean"]) == (6, pytest.approx(((1 - 2) + 5 * (5 - 2)) / 5 / 6))
    assert measures["turns 1 to 3 hold"]["paired"]["mean"] == pytest.approx(5 / 6)
    assert measures["turn 3 holds"]["paired"]["mean"] == pytest.approx(6 / 7)
    assert "note: sysbench: turns without verdict" in shown
    assert (tmp_path / "b" / "sysbench_compare.png").read_bytes().startswith(b"\x89PNG")


def test_compare_refuses_another_judge(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, retries in (("a", "3"), ("b", "2")):
        with served(scripted(), models=[model, "judge"]) as server:
            assert measure(command, tmp_path, server.url, "--retries", retries, model=model, count=1) == 0
    assert command("compare", tmp_path / "a", tmp_path / "b") == 2
    assert "sysbench: judge retries" in capsys.readouterr().err
    with served(scripted(), models=["c", "judge"]) as server:
        assert measure(command, tmp_path, server.url, model="c", count=2) == 0
    assert command("compare", tmp_path / "a", tmp_path / "c") == 2
    assert "sysbench: data: conversations is 1 and 2. " in capsys.readouterr().err
