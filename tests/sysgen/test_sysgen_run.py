"""Whole runs of SYSGEN against a scripted model: rows, what is left out, the report, kills and settings."""

import asyncio
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from scripted_model import EIGHT, SEED, answer, expected, faulty, row_of, write_rows
from scripted_server import Asked, Reply, Script, said, served

from train.data.sources import conversations
from train.errors import UserError
from train.recipe import Source
from train.sysgen.config import load_config
from train.sysgen.run import Done, run

processes = multiprocessing.get_context("forkserver")  # its children begin with the slow imports done
processes.set_forkserver_preload(["train.sysgen.run"])

SCRIPT = Path(__file__).parents[2] / "scripts" / "sysgen.py"


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
    """What a process of its own does."""
    run(load_config(path))


def run_with(script: Script, folder: Path, rows: list[dict[str, Any]], **changes: Any) -> tuple[Done, list[Asked]]:
    """A run over these rows, and what the server was asked."""
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


@pytest.mark.parametrize(("script", "count"), [(answer, 300), (faulty, 90)])
def test_rows_and_report_are_what_a_plain_loop_makes_of_them(tmp_path: Path, script: Script, count: int) -> None:
    source = tmp_path / "source.jsonl"
    write_rows(source, count)
    with served(script) as server:
        run(load_config(configuration(tmp_path, server.url, source)))
    wanted = expected(count)
    rows = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert [row["messages"] for row in rows] == [row["messages"] for row in wanted.rows]
    assert [row["sysgen"]["tags"] for row in rows] == [row["tags"] for row in wanted.rows]
    assert [row["sysgen"]["source"] for row in rows] == [f"{source}:{row['number'] + 1}" for row in wanted.rows]
    left_out = [(row["source"], row["reason"]) for row in lines(tmp_path / "out" / "left_out.jsonl")]
    assert left_out == [(f"{source}:{number + 1}", reason) for number, reason in wanted.left_out]

    facts = json.loads((tmp_path / "out" / "report.json").read_text("utf-8"))
    assert (facts["rows"], facts["rows_written"]) == (count, len(wanted.rows))
    reasons = [reason for _, reason in wanted.left_out]
    assert facts["left_out"] == {reason: reasons.count(reason) for reason in reasons}
    for tag in EIGHT:
        of = facts["tags"][tag]
        assert of["rows"] == wanted.tags[tag]
        assert of["share"] == pytest.approx(wanted.tags[tag] / len(wanted.rows))
        assert of["verdicts"] == {name: wanted.verdicts[tag, name] for name in ("Good", "Bad", "None", "missing")}
        assert of["phrases_removed"] == {name: n for (one, name), n in wanted.removed.items() if one == tag}
    assert facts["repairs"] == wanted.repairs
    assert facts["dropped"] == wanted.dropped
    assert facts["unknown_tags"] == wanted.unknown
    assert facts["characters"]["ratio"] == pytest.approx(wanted.new_characters / wanted.old_characters)
    assert {stage: of["requests"] for stage, of in facts["spent"].items()} == wanted.requests
    assert {stage: of["completion_tokens"] for stage, of in facts["spent"].items()} == wanted.completion_tokens
    assert len(facts["samples"]) == 20
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert f"{len(wanted.rows)} of {count} rows written" in report
    for reason in set(reasons):
        assert f"| {reason} | {reasons.count(reason)} | {reasons.count(reason) / count:.1%} |" in report
    assert (tmp_path / "out" / "tags.png").read_bytes()[:4] == (tmp_path / "out" / "lengths.png").read_bytes()[:4]


def test_twenty_kills_over_500_rows_give_the_same_bytes_and_repeat_nothing_that_was_written_down(
    tmp_path: Path,
) -> None:
    count, chance = 500, random.Random(11)
    source = tmp_path / "source.jsonl"
    write_rows(source, count)
    requests = expected(count).requests.total()
    moments = sorted(chance.sample(range(1, requests), 20))
    whole = tmp_path / "whole"
    whole.mkdir()
    with served(answer) as server:
        run(load_config(configuration(whole, server.url, source)))
    enough = 0

    async def slow(asked: Asked) -> Reply:
        await asyncio.sleep(0.01)
        return await answer(asked)

    with served(slow) as server:
        path = configuration(tmp_path, server.url, source)
        for moment in moments:
            enough = max(moment, len(server.asked) + 1)
            process = processes.Process(target=run_file, args=(path,))
            process.start()
            while len(server.asked) < enough and process.is_alive():
                time.sleep(0.001)
            assert process.is_alive()
            process.kill()
            process.join()
            written = tmp_path / "out" / "data" / "rows.jsonl"
            whole_lines = written.read_bytes().rpartition(b"\n")[0] if written.exists() else b""
            assert (whole / "out" / "data" / "rows.jsonl").read_bytes().startswith(whole_lines)
        run_file(path)
        again = len(server.asked)
        run_file(path)
        assert len(server.asked) == again
        repeated = server.answered.total() - requests
    for name in ("data/rows.jsonl", "left_out.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (whole / "out" / name).read_bytes()
    facts, whole_facts = (json.loads((one / "out" / "report.json").read_text("utf-8")) for one in (tmp_path, whole))
    for of in (*facts["spent"].values(), *whole_facts["spent"].values()):
        del of["seconds"]
    assert facts == whole_facts
    # Each kill may lose what the server had just answered and the journal had not yet written: no more than the client
    # promises, a quarter more than its places.
    assert repeated <= 20 * (16 + 4)
    print(f"answered twice over 20 kills: {repeated} of {requests}")


def test_the_trainer_reads_what_is_written_in_either_format(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(60)]
    read = []
    for format in ("jsonl", "parquet"):
        folder = tmp_path / format
        folder.mkdir()
        run_with(answer, folder, rows, output={"format": format, "rows_per_file": 7})
        read.append([row.messages for _, row in conversations(Source(path=str(folder / "out" / "data")))])
    assert read[0] == read[1] == [row["messages"] for row in expected(60).rows]
    files = sorted((tmp_path / "parquet" / "out" / "data").iterdir())
    assert [pyarrow.parquet.read_metadata(file).num_rows for file in files] == [7] * (len(files) - 1) + [
        len(read[0]) - 7 * (len(files) - 1)
    ]


def test_another_setting_rewrites_the_rows_and_asks_only_what_depends_on_it(tmp_path: Path) -> None:
    rows = [row_of(number) for number in range(40)]
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with served(answer) as server:
        run(load_config(configuration(tmp_path, server.url, source)))
        first = (tmp_path / "out" / "data" / "rows.jsonl").read_bytes()
        asked = len(server.asked)
        longer = configuration(tmp_path, server.url, source, answer={"max_tokens": 2048})
        run(load_config(longer))
        cut = [asked.body for asked in server.asked[asked:]]
        assert all(body["max_tokens"] == 2048 for body in cut)  # what was cut, and that alone
        assert len(cut) == sum(reason == "new answer cut at the token limit" for _, reason in expected(40).left_out)
        asked = len(server.asked)
        run(load_config(configuration(tmp_path, server.url, source, answer={"max_tokens": 1024, "temperature": 0.1})))
        assert {body["temperature"] for body in (asked.body for asked in server.asked[asked:])} == {0.1}
        run(
            load_config(
                configuration(tmp_path, server.url, source, data={"sources": [{"path": str(source)}], "limit": 20})
            )
        )
        assert (tmp_path / "out" / "data" / "rows.jsonl").read_bytes() == b"".join(
            line for line in first.splitlines(keepends=True) if int(json.loads(line)["sysgen"]["source"].rpartition(":")[2]) <= 20
        )  # fmt: skip


def good_everything(asked: Asked) -> str:
    """A model that does all as asked."""
    if asked.prompt.startswith("The next conversation"):
        return "<<Role>>You are a tester.<</Role>>"
    if "Judge for each of the eight" in asked.prompt:
        return "\n".join(f"<<{tag}>>: Good" for tag in EIGHT)
    return "Yes" if asked.prompt.startswith("An assistant was given") else "a fine new answer"


def saying(**changes: str) -> Script:
    """`good_everything`, but for the stages named."""

    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        stage = {"<<Role>": "generate", "<<Role>>: Good": "verify", "Yes": "judge"}.get(text[:14], "answer")
        stage = "generate" if text.startswith("<<Role>>You") else stage
        return said(changes.get(stage, text))

    return script


@pytest.mark.parametrize(
    ("existing_system", "system", "asked_of"),
    [
        ("replace", "You are a tester.", ["generate", "verify", "answer"]),
        ("keep", "Be brief.", []),
        ("refine", "You are a tester.", ["generate", "verify", "answer"]),
    ],
)
def test_existing_system_messages(tmp_path: Path, existing_system: str, system: str, asked_of: list[str]) -> None:
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
def test_the_ablations_of_the_paper(
    tmp_path: Path, changes: dict[str, str], requests: int, system: str, reply: str
) -> None:
    _, asked = run_with(saying(), tmp_path, [question()], **changes)
    assert len(asked) == requests
    assert [turn["content"] for turn in only_row(tmp_path)["messages"]] == [system, question()["messages"][0]["content"], reply]  # fmt: skip


@pytest.mark.parametrize(
    ("on_empty", "requests"), [("retry", 3), ("drop", 1), ("keep_without_system", 1)]
)  # fmt: skip
def test_a_row_without_a_valid_phrase(tmp_path: Path, on_empty: str, requests: int) -> None:
    done, asked = run_with(saying(generate="no tags"), tmp_path, [question()], on_empty=on_empty)
    assert len(asked) == requests
    if on_empty == "keep_without_system":
        assert only_row(tmp_path)["messages"] == question()["messages"]
        assert done.tally.with_message == 0
    else:
        assert only_reason(tmp_path) == "no valid phrase"


@pytest.mark.parametrize(("choice", "kept"), [("keep", True), ("drop", False)])
def test_a_tag_without_a_verdict(tmp_path: Path, choice: str, kept: bool) -> None:
    run_with(saying(verify="Looks fine to me."), tmp_path, [question()], on_missing_verdict=choice)
    if kept:
        assert only_row(tmp_path)["messages"][0]["content"] == "You are a tester."
    else:
        assert only_reason(tmp_path) == "no phrase was verified"


@pytest.mark.parametrize("choice", ["drop", "keep", "original"])
def test_an_answer_that_was_cut(tmp_path: Path, choice: str) -> None:
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


def test_each_turn_is_answered_in_sequence_and_sees_the_new_ones(tmp_path: Path) -> None:
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


def test_answers_that_need_tools_stay_as_they_are(tmp_path: Path) -> None:
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
        assert [one.prompt[:5] for one in asked] == ["The n", "Below", "Below"]  # verified for each of the two answers
        ((_, written),) = conversations(Source(path=str(folder / "out" / "data")))
        assert written.messages == [{"role": "system", "content": "You are a tester."}, *row["messages"]]
        assert written.tools == row["tools"]


def test_rows_that_cannot_be_read_or_are_refused_by_the_server_are_left_out_with_their_place(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if "too long" in asked.prompt:
            return Reply(400, {"error": {"message": "longer than the context"}})
        return said(good_everything(asked))

    middle = question()["messages"]
    middle.insert(1, {"role": "system", "content": "now in French"})
    rows = [question(), {"messages": [{"role": "user", "content": "hm"}]}, question("too long"), {"messages": middle}]
    done, _ = run_with(script, tmp_path, rows)
    assert done.tally.written == 1
    told = [(row["source"].rpartition(":")[2], row["reason"]) for row in lines(tmp_path / "out" / "left_out.jsonl")]
    assert told == [
        ("2", "can't be read: no assistant turn"),
        ("3", "no answer from the model"),
        ("4", "a system message in the middle of the conversation"),
    ]


def test_the_judge(tmp_path: Path) -> None:
    run_with(saying(judge="No."), tmp_path, [question()], gates={"judge": True})
    assert only_reason(tmp_path) == "gate: the answer ignores the system message"
    (tmp_path / "yes").mkdir()
    run_with(saying(), tmp_path / "yes", [question()], gates={"judge": True})
    assert only_row(tmp_path / "yes")["messages"][2]["content"] == "a fine new answer"


def test_a_message_in_another_language_is_written_again(tmp_path: Path) -> None:
    german = "<<Task>>Beantworte die Fragen der Reisenden zu den Verbindungen und fasse dich dabei immer kurz.<</Task>>"
    english = "<<Task>>Answer the questions of the travellers about their connections, and always be brief.<</Task>>"

    async def script(asked: Asked) -> Reply:
        if not asked.prompt.startswith("The next conversation"):
            return said(good_everything(asked))
        return said(english if asked.body["seed"] > SEED else german)

    row = question("When does the next train to Geneva leave, and do I have to change on the way there?")
    done, _ = run_with(script, tmp_path, [row])
    assert only_row(tmp_path)["messages"][0]["content"].startswith("Answer the questions")
    assert done.tally.events["gate: in another language than the conversation"] == 1
    (tmp_path / "none").mkdir()
    run_with(script, tmp_path / "none", [row], on_empty="drop")
    assert only_reason(tmp_path / "none") == "gate: in another language than the conversation"


def test_a_message_that_gives_the_answer_away_is_left_out(tmp_path: Path) -> None:
    reply = "The battle was fought on a cold morning in October, near the mouth of the river."
    row = question("When was it?", reply)
    run_with(saying(generate=f"<<Content>>Say that {reply}<</Content>>"), tmp_path, [row])
    assert only_reason(tmp_path) == "gate: gives the answer away"


def test_of_messages_that_are_nearly_the_same_the_first_is_kept(tmp_path: Path) -> None:
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
def test_constraints_stand_in_the_message_and_hold_for_the_answer(tmp_path: Path, obeys: bool) -> None:
    """A model that can do one thing alone: it writes whatever the drawn constraint asks for, or never does."""
    rows = [question(f"question [{number}]?", "Tea is made of leaves and water. " * 3) for number in range(30)]
    made: list[str] = []

    async def script(asked: Asked) -> Reply:
        text = good_everything(asked)
        if text != "a fine new answer":
            return said(text)
        system = asked.body["messages"][0]["content"]
        made.append(system)
        return said("Tea." if obeys and system != "You are a tester." else "TEA, tea!! `tea` " * 40)

    settings = {"constraints": {"share": 1.0, "at_most": 1, "attempts": 2}}
    done, _ = run_with(script, tmp_path, rows, **settings)
    written = lines(tmp_path / "out" / "data" / "rows.jsonl")
    assert len(written) == len(rows)
    for row in written:
        constraints = row["sysgen"]["constraints"]
        system = row["messages"][0]["content"]
        assert system == " ".join(["You are a tester.", *(one["text"] for one in constraints)])
        if constraints:
            assert (constraints[0]["tag"], constraints[0]["kind"]) != ("", "")
    with_constraints = [row for row in written if row["sysgen"]["constraints"]]
    given_up = len(rows) - len(with_constraints)
    assert done.tally.events["constraints given up"] == given_up
    assert sum(done.tally.constraints.values()) == len(with_constraints)
    if obeys:
        assert with_constraints
        assert all(row["messages"][2]["content"] == "Tea." for row in with_constraints)
    assert given_up  # some kinds (a list, a title) are met by neither answer
    broken = done.tally.events["answer that breaks a constraint"]
    assert broken == len(made) - len(rows) if not obeys else broken >= 2 * given_up


def test_ctrl_c_keeps_what_was_answered(tmp_path: Path) -> None:
    async def script(asked: Asked) -> Reply:
        if asked.number >= 30:
            await asyncio.Event().wait()
        return await answer(asked)

    source = tmp_path / "source.jsonl"
    write_rows(source, 100)
    with served(script) as server:
        command = [sys.executable, str(SCRIPT), "--config", str(configuration(tmp_path, server.url, source))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while len(server.asked) < 46:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip() == "stopped; what was answered is in the journal, and the same command goes on from here"


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_the_check_reads_all_rows_and_asks_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    write_rows(source, 20)
    with source.open("a") as file:
        file.write('{"messages": []}\n')
    path = configuration(tmp_path, "http://127.0.0.1:9/v1", source)
    checked = command("--config", str(path), "--check")
    assert checked.returncode == 0, checked.stderr
    turns = sum(len(row_of(number)["messages"]) // 2 for number in range(20))
    assert checked.stdout.splitlines() == [
        "21 rows, 0 of them with a system message (existing_system: replace)",
        "warning: 1 rows can't be read: no assistant turn",
        f"about {20 + 2 * turns} requests to m, 16 at once, if every row passes at the first try",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("generate.max_tokns=5", "generate.max_tokns: unknown key. Did you mean `generate.max_tokens`?"),
        ("tags.target_share.Toll=0.1", "tags.target_share.Toll: unknown key. Did you mean `tags.target_share.Tool`?"),
        ("on_empty=skip", "on_empty: found 'skip'. Allowed: retry, drop, keep_without_system."),
        ("gates.leak=2", "gates.leak: found 2. Allowed: a number above 0 and not above 1; or null."),
        ("api_key=x", "Set them in the environment"),
        ("data.sources.0.path=nowhere.jsonl", "nowhere.jsonl: there is no nowhere.jsonl in"),
        ("servers.0.base_url=localhost", "base_url 'localhost' is no address: write it like http://localhost:8000/v1."),
    ],
)
def test_what_the_user_can_mend_is_one_error(tmp_path: Path, change: str, told: str) -> None:
    source = tmp_path / "source.jsonl"
    write_rows(source, 1)
    path = configuration(tmp_path, "http://127.0.0.1:9/v1", source)
    failed = command("--config", str(path), change)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("error: ")
    assert told in failed.stderr
    assert "Traceback" not in failed.stderr


def test_another_format_in_the_same_folder_is_an_error(tmp_path: Path) -> None:
    run_with(saying(), tmp_path, [question()])
    with pytest.raises(UserError, match=r"rows.jsonl is of an earlier run with another output.format"):
        run_with(saying(), tmp_path, [question()], output={"format": "parquet"})
