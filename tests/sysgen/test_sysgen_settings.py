"""Effects of each key of a SYSGEN configuration."""

import json
import sys
from pathlib import Path

import pytest
from scripted_model import SEED
from scripted_server import Asked, Reply, said, served
from sysgen_runs import configuration, good_everything, lines, only_reason, only_row, question, run_with, saying

from train.data.sources.source import read_conversations
from train.recipe import Source


@pytest.mark.parametrize(
    ("existing_system", "system", "asked_of"),
    [
        ("replace", "You are a tester.", ["generate", "verify", "answer"]),
        ("keep", "Be brief.", []),
        ("refine", "You are a tester.", ["generate", "verify", "answer"]),
    ],
)
def test_existing_system_messages_are_replaced_kept_or_refined(
    tmp_path: Path, existing_system: str, system: str, asked_of: list[str]
) -> None:
    row = question(system="Be brief.")
    _, asked = run_with(saying(), tmp_path, [row], existing_system=existing_system)
    written = only_row(tmp_path)["messages"]
    assert written[0] == {"role": "system", "content": system}
    assert written[2]["content"] == ("old answer" if existing_system == "keep" else "a fine new answer")
    assert len(asked) == len(asked_of)
    if asked:
        assert ("Be brief." in asked[0].prompt) == (existing_system == "refine")


@pytest.mark.parametrize(
    ("changes", "requests", "system", "reply"),
    [
        ({"message": "common"}, 1, "You are a helpful AI assistant.", "a fine new answer"),
        ({"message": "common", "common_message": "Hi.", "answers": "original"}, 0, "Hi.", "old answer"),
        ({"answers": "original"}, 2, "You are a tester.", "old answer"),
    ],
)
def test_the_papers_ablations(tmp_path: Path, changes: dict[str, str], requests: int, system: str, reply: str) -> None:
    _, asked = run_with(saying(), tmp_path, [question()], **changes)
    assert len(asked) == requests
    assert [turn["content"] for turn in only_row(tmp_path)["messages"]] == [system, question()["messages"][0]["content"], reply]  # fmt: skip


@pytest.mark.parametrize(
    ("on_empty", "requests"), [("retry", 3), ("drop", 1), ("keep_without_system", 1)]
)  # fmt: skip
def test_a_row_without_a_valid_phrase_follows_on_empty(tmp_path: Path, on_empty: str, requests: int) -> None:
    done, asked = run_with(saying(generate="no tags"), tmp_path, [question()], on_empty=on_empty)
    assert len(asked) == requests
    if on_empty == "keep_without_system":
        assert only_row(tmp_path)["messages"] == question()["messages"]
        assert done.stats.with_message == 0
    else:
        assert only_reason(tmp_path) == "no valid phrase"


@pytest.mark.parametrize(("choice", "kept"), [("keep", True), ("drop", False)])
def test_a_tag_without_a_verdict_follows_on_missing_verdict(tmp_path: Path, choice: str, kept: bool) -> None:
    run_with(saying(verify="Looks fine to me."), tmp_path, [question()], on_missing_verdict=choice)
    if kept:
        assert only_row(tmp_path)["messages"][0]["content"] == "You are a tester."
    else:
        assert only_reason(tmp_path) == "no phrase was verified"


@pytest.mark.parametrize(
    ("replies", "stage"),
    [
        (
            {"verify": "Looks fine to me."},
            "verify: 2 of 2 verdicts could not be read (100%). The phrases of these tags",
        ),
        ({"judge": "Hm."}, "gates.judge: 2 of 2 verdicts could not be read (100%). These rows were kept"),
        ({"verify": "1. Role: Good", "judge": "It uses no jargon, so yes."}, ""),
    ],
)
def test_a_run_with_mostly_unread_verdicts_ends_with_a_warning(
    tmp_path: Path, replies: dict[str, str], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from sysgen import main

    rows = [question(), question("question [2] of the same kind?")]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with served(saying(**replies)) as server, pytest.MonkeyPatch.context() as patch:
        config = configuration(tmp_path, server.url, source, gates={"judge": True})
        patch.setattr(sys, "argv", ["sysgen.py", "--config", str(config)])
        assert main() == 0
    last = capsys.readouterr().out.splitlines()[-1]
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    if stage:
        assert last.startswith(f"warning: {stage}")
        assert f"**Warning: {stage}" in report
    else:
        assert "warning" not in last
        assert "Warning" not in report


def test_half_of_the_verdicts_unread_is_no_warning(tmp_path: Path) -> None:
    message = "<<Role>>a<</Role>><<Style>>b<</Style>><<Task>>c<</Task>><<Tool>>d<</Tool>>"
    for read, warned in (("Role: Good\nStyle: Good", False), ("Role: Good", True)):
        (tmp_path / str(warned)).mkdir()
        done, _ = run_with(saying(generate=message, verify=read), tmp_path / str(warned), [question()])
        assert bool(done.stats.warnings()) is warned


@pytest.mark.parametrize("choice", ["drop", "keep", "original"])
def test_a_cut_answer_follows_on_unfinished_answer(tmp_path: Path, choice: str) -> None:
    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        return said(text, "length" if text == "a fine new answer" else "stop")

    run_with(script, tmp_path, [question()], on_unfinished_answer=choice)
    if choice == "drop":
        assert only_reason(tmp_path) == "new answer cut at the token limit"
    else:
        reply = {"keep": "a fine new answer", "original": "old answer"}[choice]
        row = only_row(tmp_path)
        assert row["messages"][2]["content"] == reply
        assert row["sysgen"]["answers"] == {"keep": "anew", "original": "original"}[choice]


def test_turns_are_answered_in_sequence_and_see_the_new_answers(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {number}"} for number in range(3) for role in ("user", "assistant")] + [
        {"role": "user", "content": "and then?"}
    ]
    seen: list[list[dict[str, str]]] = []

    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        if text == "a fine new answer":
            seen.append(asked.body["messages"])
            text = f"new {len(seen)}"
        return said(text)

    run_with(script, tmp_path, [{"messages": turns}])
    system = {"role": "system", "content": "You are a tester."}
    user = [{"role": "user", "content": f"user {number}"} for number in range(3)]
    new = [{"role": "assistant", "content": f"new {number}"} for number in (1, 2, 3)]
    assert seen == [
        [system, user[0]],
        [system, user[0], new[0], user[1]],
        [system, user[0], new[0], user[1], new[1], user[2]],
    ]
    assert only_row(tmp_path)["messages"] == [*seen[2], new[2]]  # what follows the last answer is left out


@pytest.mark.parametrize(("second", "stays"), [("Good", True), ("None", True), ("Bad", False)])
def test_a_message_is_verified_against_every_turn(tmp_path: Path, second: str, stays: bool) -> None:
    turns = question("first")["messages"] + question("second")["messages"]

    async def script(asked: Asked) -> Reply:
        if "Judge for each" not in asked.prompt:
            return said(good_everything(asked))
        assert ("### User\nfirst" in asked.prompt) != ("### User\nsecond" in asked.prompt)
        return said(f"<<Role>>: {'Good' if 'first' in asked.prompt else second}")

    run_with(script, tmp_path, [{"messages": turns}])
    if stays:
        assert len(only_row(tmp_path)["messages"]) == 5
    else:
        assert only_reason(tmp_path) == "no phrase was verified"


def test_answers_that_need_tools_are_kept(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky"}}}
    row = {
        "messages": [
            {"role": "user", "content": "Which colour?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "blue", "name": "look_up"},
            {"role": "assistant", "content": "Blue."},
        ],
        "tools": [{"type": "function", "function": {"name": "look_up", "parameters": {}}}],
    }
    for format in ("jsonl", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        _, asked = run_with(saying(), folder, [row], output={"format": format})
        assert '"look_up"' in asked[0].prompt
        assert [request.prompt[:5] for request in asked] == [
            "The n",
            "Below",
            "Below",
        ]  # verified for each of the two answers
        ((_, written),) = read_conversations(Source(path=str(folder / "out" / "data")))
        assert written.messages == [{"role": "system", "content": "You are a tester."}, *row["messages"]]
        assert written.tools == row["tools"]


def test_unreadable_and_refused_rows_are_dropped_with_their_place(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if "too long" in asked.prompt:
            return Reply(400, {"error": {"message": "longer than the context"}})
        return said(good_everything(asked))

    middle = question()["messages"]
    middle.insert(1, {"role": "system", "content": "now in French"})
    rows = [question(), {"messages": [{"role": "user", "content": "hm"}]}, question("too long"), {"messages": middle}]
    done, _ = run_with(script, tmp_path, rows)
    assert done.stats.written == 1
    reasons = [(row["source"].rpartition(":")[2], row["reason"]) for row in lines(tmp_path / "out" / "left_out.jsonl")]
    assert reasons == [
        ("2", "can't be read: no assistant turn"),
        ("3", "no answer from the model"),
        ("4", "not supported: a system message in the middle of the conversation"),
    ]


def test_the_judge_drops_rows_whose_answer_ignores_the_message(tmp_path: Path) -> None:
    run_with(saying(judge="No."), tmp_path, [question()], gates={"judge": True})
    assert only_reason(tmp_path) == "gate: the answer ignores the system message"
    (tmp_path / "yes").mkdir()
    run_with(saying(), tmp_path / "yes", [question()], gates={"judge": True})
    assert only_row(tmp_path / "yes")["messages"][2]["content"] == "a fine new answer"


def test_a_message_in_another_language_is_generated_again(tmp_path: Path) -> None:
    german = "<<Task>>Beantworte die Fragen der Reisenden zu den Verbindungen und fasse dich dabei immer kurz.<</Task>>"
    english = "<<Task>>Answer the questions of the travellers about their connections, and always be brief.<</Task>>"

    async def script(asked: Asked) -> Reply:
        if not asked.prompt.startswith("The next conversation"):
            return said(good_everything(asked))
        return said(english if asked.body["seed"] > SEED else german)

    row = question("When does the next train to Geneva leave, and do I have to change on the way there?")
    done, _ = run_with(script, tmp_path, [row])
    assert only_row(tmp_path)["messages"][0]["content"].startswith("Answer the questions")
    assert done.stats.events["gate: in another language than the conversation"] == 1
    (tmp_path / "none").mkdir()
    run_with(script, tmp_path / "none", [row], on_empty="drop")
    assert only_reason(tmp_path / "none") == "gate: in another language than the conversation"


def test_a_row_whose_message_gives_the_answer_away_is_dropped(tmp_path: Path) -> None:
    reply = "The battle was fought on a cold morning in October, near the mouth of the river."
    row = question("When was it?", reply)
    run_with(saying(generate=f"<<Content>>Say that {reply}<</Content>>"), tmp_path, [row])
    assert only_reason(tmp_path) == "gate: gives the answer away"


def test_the_first_of_near_duplicate_messages_is_kept(tmp_path: Path) -> None:
    rows = [question(f"question [{number}] about the sea?") for number in range(6)]
    messages = [
        "You are a patient teacher who explains how the tides come about to children of ten years.",
        "You are a sailor who tells of storms, of harbours and of long nights on deck.",
    ]

    async def script(asked: Asked) -> Reply:
        if not asked.prompt.startswith("The next conversation"):
            return said(good_everything(asked))
        number = int(asked.prompt.rpartition("[")[2].partition("]")[0])
        return said(f"<<Role>>{messages[number % 2]}{' Mostly.' if number > 3 else ''}<</Role>>")

    run_with(script, tmp_path, rows, gates={"near_duplicates": 0.7})
    assert [row["sysgen"]["source"][-2:] for row in lines(tmp_path / "out" / "data" / "rows.jsonl")] == [":1", ":2"]
    reasons = {row["reason"] for row in lines(tmp_path / "out" / "left_out.jsonl")}
    assert reasons == {"gate: nearly the system message of a row before"}


@pytest.mark.parametrize("obeys", [True, False])
def test_constraints_are_in_the_message_and_met_by_the_answer(tmp_path: Path, obeys: bool) -> None:
    """With a model that always meets the drawn constraint, and with one that never does."""
    rows = [question(f"question [{number}]?", "Tea is made of leaves and water. " * 3) for number in range(30)]
    systems: list[str] = []

    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        if text != "a fine new answer":
            return said(text)
        system = asked.body["messages"][0]["content"]
        systems.append(system)
        return said("Tea." if obeys and system != "You are a tester." else "TEA, tea!! `tea` " * 40)

    settings = {"constraints": {"share": 1.0, "at_most": 1, "attempts": 2}}
    done, _ = run_with(script, tmp_path, rows, **settings)
    written = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert len(written) == len(rows)
    for row in written:
        constraints = row["sysgen"]["constraints"]
        system = row["messages"][0]["content"]
        assert system == " ".join(["You are a tester.", *(constraint["text"] for constraint in constraints)])
        if constraints:
            assert (constraints[0]["tag"], constraints[0]["kind"]) != ("", "")
    with_constraints = [row for row in written if row["sysgen"]["constraints"]]
    given_up = len(rows) - len(with_constraints)
    assert done.stats.events["constraints given up"] == given_up
    assert sum(done.stats.constraints.values()) == len(with_constraints)
    if obeys:
        assert with_constraints
        assert all(row["messages"][2]["content"] == "Tea." for row in with_constraints)
    assert given_up  # some kinds (a list, a title) are met by neither answer
    broken = done.stats.events["answer that breaks a constraint"]
    assert broken == len(systems) - len(rows) if not obeys else broken >= 2 * given_up
