"""scripts/evaluate.py ifeval: requests, files, errors, and continuing after kill -9."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from killed_batches import check_killed_run
from scripted_server import Asked, Reply, error, said, served

from train.ifeval.rows import read_rows

ROOT = Path(__file__).parents[3]
OURS = ROOT / "recipes" / "smollm2-135m" / "data"
SYSTEM, USER = OURS / "system_ifeval.jsonl", OURS / "system_ifeval_user.jsonl"


def write_rows(path: Path, system: bool, count: int = 12) -> Path:
    """Every prompt asks for no comma, every third one also for a title."""
    with path.open("w", encoding="utf-8") as lines:
        for number in range(count):
            rules = ["punctuation:no_comma"] + ["detectable_format:title"] * (number % 3 == 0)
            turns = (
                [("system", "Obey."), ("user", f"Say {number}.")] if system else [("user", f"Obey.\n\nSay {number}.")]
            )
            messages = [{"role": role, "content": text} for role, text in turns]
            row = {"key": number, "prompt": "p", "instruction_id_list": rules, "kwargs": [{}] * len(rules)}
            lines.write(json.dumps(row | {"messages": messages}) + "\n")
    return path


async def obeys_users(asked: Asked) -> Reply:
    """Follow everything in the user turn; with a system message add a comma, except for `Say 3.` and `Say 6.`"""
    number = int(asked.prompt.split()[-1].strip("."))
    if number == 7:
        return error(400, "this prompt is refused")
    if number == 8:
        return said("")
    if len(asked.body["messages"]) == 1 or number in (3, 6):
        return said("<think>A comma, perhaps?</think>\n\n<<A title>> and a river")
    return said("Here it is,\n<<A title>> and a river", "length" if number == 9 else "stop")


def test_a_server_is_asked_once_and_the_files_match_its_answers(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, control = write_rows(tmp_path / "s.jsonl", True), write_rows(tmp_path / "u.jsonl", False)
    out = tmp_path / "out"
    with served(obeys_users) as server:
        arguments = (
            "ifeval",
            "--model",
            "m",
            "--server",
            server.url,
            "--data",
            data,
            "--control",
            control,
            "--output-dir",
            out,
        )
        assert command(*arguments) == 0
        shown = capsys.readouterr().out
        asked = len(server.asked)
        assert {request.body["temperature"] for request in server.asked} == {0}
        assert {request.body["max_tokens"] for request in server.asked} == {1280}
        assert command(*arguments, "--limit", "5") == 0
        assert len(server.asked) == asked  # all is in the journal, and what failed isn't among the first five
        limited = json.loads((out / "ifeval.json").read_text(encoding="utf-8"))
        assert (limited["data"]["prompts"], limited["data"]["constraints"]) == (5, 7)
        assert command(*arguments) == 0
    record = json.loads((out / "ifeval.json").read_text(encoding="utf-8"))
    assert limited["data"]["fingerprint"] != record["data"]["fingerprint"]
    answers = [json.loads(line) for line in (out / "ifeval_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(request["turn"], request["key"]) for request in answers] == [
        (turn, n) for turn in ("system", "user") for n in range(12)
    ]
    by_place = {(request["turn"], request["key"]): request for request in answers}
    assert by_place["system", 3]["answer"] == "<<A title>> and a river"  # what is thought isn't said
    assert (by_place["system", 3]["strict"], by_place["system", 0]["strict"]) == ([True, True], [False, True])
    assert by_place["system", 1]["loose"] == [True]  # without its first line there is no comma
    assert (by_place["user", 7]["answer"], by_place["user", 7]["strict"]) == (None, [False])
    assert record["system"]["endings"] == {"ended": 9, "no answer": 1, "empty": 1, "cut": 1}
    assert "this prompt is refused" in by_place["system", 7]["why"]
    assert by_place["system", 8]["why"] is None
    assert "2 prompts got no answer and count as following nothing; the first (key 7, in the system message): " in shown
    assert "this prompt is refused" in shown
    assert shown.splitlines()[-1].startswith("warning: 2 prompts got no answer and count as following nothing")
    # 12 prompts, 16 constraints. System turn: 3 and 6 follow both, 0 and 9 their title alone; user turn: all but 7, 8.
    values = {
        turn: {name: record[turn][name]["value"] for name in ("prompt_strict", "constraint_strict")}
        for turn in ("system", "user")
    }
    assert values == {
        "system": {"prompt_strict": 2 / 12, "constraint_strict": pytest.approx(6 / 16)},
        "user": {"prompt_strict": pytest.approx(10 / 12), "constraint_strict": pytest.approx(14 / 16)},
    }
    assert record["gap"]["prompt_strict"]["mean"] == pytest.approx(-8 / 12)
    assert record["gap"]["prompt_strict"]["high"] < 0
    assert record["system"]["by_rule"]["detectable_format:title"]["strict"]["value"] == 1
    report = (out / "report.md").read_text(encoding="utf-8")
    assert report.count("## Constraints that a program can check") == 1
    assert "16.7 % [" in report
    assert "-66.7 [" in report
    assert report.strip() in shown
    assert (out / "ifeval.png").read_bytes().startswith(b"\x89PNG")


def test_skipped_rules_can_be_scored(command: Callable[..., int], tmp_path: Path) -> None:
    rows = [
        {"key": 1, "prompt": "p", "instruction_id_list": ["combination:repeat_prompt"], "kwargs": [{"prompt_to_repeat": "Say 1."}]},
        {"key": 2, "prompt": "Say 3.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row | {"prompt": "Say 3."}) + "\n" for row in rows), encoding="utf-8")
    with served(obeys_users) as server:
        arguments = ("ifeval", "--model", "m", "--server", server.url, "--data", data, "--output-dir", tmp_path)
        assert command(*arguments) == 0
        record = json.loads((tmp_path / "ifeval.json").read_text(encoding="utf-8"))
        assert record["data"]["left_out"] == {"combination:repeat_prompt": 1}
        assert (record["data"]["prompts"], record["user"]["prompt_strict"]["value"]) == (1, 1)
        assert command(*arguments, "--all-rules") == 0
    record = json.loads((tmp_path / "ifeval.json").read_text(encoding="utf-8"))
    assert (record["data"]["prompts"], record["user"]["prompt_strict"]["value"]) == (2, 0.5)


def test_user_errors_are_reported_before_the_first_request(says_no: Callable[..., str], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "s.jsonl", True)
    assert "--output-dir FOLDER" in says_no("ifeval", "--model", "some/model", "--data", data)
    out = ("--output-dir", tmp_path / "out")
    assert "cannot be read" in says_no("ifeval", "--model", "m", "--data", tmp_path / "none.jsonl", *out)
    other = write_rows(tmp_path / "u.jsonl", False, count=3)
    assert "key 3" in says_no("ifeval", "--model", "m", "--data", data, "--control", other, *out)
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["length_constraints:number_words"], "kwargs": [{}]}
    other.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert "u.jsonl:1: kwargs of length_constraints:number_words" in says_no(
        "ifeval", "--model", "m", "--data", other, *out
    )
    row |= {"instruction_id_list": ["combination:repeat_prompt"], "kwargs": [{"prompt_to_repeat": "p"}]}
    other.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert "--all-rules" in says_no("ifeval", "--model", "m", "--data", other, *out)
    assert "Allowed: an integer >= 1" in says_no("ifeval", "--model", "m", "--data", data, "--limit", "0")
    for temperature in ("-1", "nan", "hot"):
        assert f"--temperature {temperature}: found " in says_no(
            "ifeval", "--model", "m", "--data", data, *out, f"--temperature={temperature}"
        )


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    plain, marked = write_rows(tmp_path / "s.jsonl", True), tmp_path / "marked.jsonl"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    assert [row.messages for row in read_rows(marked)] == [row.messages for row in read_rows(plain)]


def rewritten(path: Path, source: Path, change: Callable[[dict], object]) -> Path:
    """Write the rows of `source`, each after `change`, to a file."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        change(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_swapped_or_equal_files_of_data_and_control_are_refused(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path
) -> None:
    data, control = write_rows(tmp_path / "s.jsonl", True), write_rows(tmp_path / "u.jsonl", False)

    def error_of(data: Path, control: Path) -> str:
        with served(obeys_users) as server:
            refusal = says_no("ifeval", "--model", "m", "--server", server.url, "--output-dir", tmp_path / "out",
                              "--data", data, "--control", control)  # fmt: skip
            assert not server.asked
        assert not (tmp_path / "out" / "ifeval.json").exists()
        return refusal

    exchanged = error_of(control, data)
    assert exchanged.startswith(f"--data {control}:1: the row with key 0 has no system message")
    assert "swapped" in exchanged
    itself = f"--control {data}:1: the row with key 0 has its constraints in the system message"
    assert error_of(data, data).startswith(itself)
    # A persona may stand in the system message of both; the one that has the constraints beside it is no control.
    persona = {"role": "system", "content": "You are a lighthouse."}

    def add(row: dict) -> None:
        row["messages"] = [{"role": "system", "content": "You are a lighthouse.\n\nObey."}, row["messages"][-1]]

    both = rewritten(tmp_path / "both.jsonl", data, add)
    plain = rewritten(tmp_path / "p.jsonl", control, lambda row: row["messages"].insert(0, persona))
    assert "has its constraints in the system message" in error_of(plain, both)
    taken_out = rewritten(tmp_path / "t.jsonl", data, lambda row: row["messages"].pop(0))
    assert error_of(taken_out, control).startswith(f"--data {taken_out}:1: the row with key 0 has no system message")
    lacks = error_of(data, taken_out)
    assert lacks.startswith(f"--control {taken_out}:1: the row with key 0 has the same user turn as {data}:1, so")
    out = tmp_path / "good"
    with served(obeys_users) as server:
        assert command("ifeval", "--model", "m", "--server", server.url, "--output-dir", out, "--limit", "2",
                       "--data", both, "--control", plain) == 0  # fmt: skip
    persona_alone = rewritten(tmp_path / "q.jsonl", taken_out, lambda row: row["messages"].insert(0, persona))
    assert "has the same user turn as" in error_of(both, persona_alone)
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows[4]["messages"][0]["content"] = " "
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert error_of(data, control).startswith(f"--data {data}:5: the row with key 4 has no system message")
    some = says_no("ifeval", "--model", "m", "--server", "http://localhost:1/v1", "--output-dir", tmp_path / "out",
                   "--data", data)  # fmt: skip
    assert some.startswith(f"--data {data}: 1 of 12 rows has no system message (the first {data}:5)")


def test_rows_without_a_system_message_are_reported_as_such(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """IFEval's own rows have no `messages`; in other rows the user turn need not hold the constraints."""
    source = write_rows(tmp_path / "u.jsonl", False, count=3)

    def as_ifeval(row: dict) -> None:
        row["prompt"] = row.pop("messages")[0]["content"]

    kinds = {
        "in the user turn": rewritten(tmp_path / "i.jsonl", source, as_ifeval),
        "without a system message": rewritten(tmp_path / "t.jsonl", source, lambda row: None),
    }
    for number, (words, data) in enumerate(kinds.items()):
        out = tmp_path / str(number)
        with served(obeys_users) as server:
            capsys.readouterr()
            assert command("ifeval", "--model", "m", "--server", server.url, "--data", data, "--output-dir", out) == 0
        record = json.loads((out / "ifeval.json").read_text(encoding="utf-8"))
        assert record["user"]["prompt_strict"]["value"] == 1
        assert "system" not in record
        lines = (out / "ifeval_answers.jsonl").read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["turn"] for line in lines} == {"user"}
        report = (out / "report.md").read_text(encoding="utf-8")
        assert f"| | {words} |" in report
        assert f"Constraints {words}: 3 ended." in report
        assert "system message" not in report.replace(words, "")
        shutil.copytree(out, tmp_path / f"copy-{number}")
        assert command("compare", out, tmp_path / f"copy-{number}") == 0
        assert "| ifeval: user: prompts, strict | 100.0 %" in capsys.readouterr().out


async def has_no_system_role(asked: Asked) -> Reply:
    """A server whose template refuses the role, like that of Gemma 2."""
    if asked.body["messages"][0]["role"] == "system":
        return error(400, "System role not supported")
    return said("A river")


def test_a_turn_without_any_answer_is_an_error(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path
) -> None:
    """A model whose server refuses every system message has no share of 0 %: it was never asked."""
    data, control = write_rows(tmp_path / "s.jsonl", True), write_rows(tmp_path / "u.jsonl", False)
    with served(has_no_system_role) as server:
        arguments = ("ifeval", "--model", "m", "--server", server.url, "--data", data, "--control", control,
                     "--output-dir", tmp_path / "out")  # fmt: skip
        refusal = says_no(*arguments)
        assert "none of the 12 prompts with constraints in the system message got an answer" in refusal
        assert "System role not supported. If the model has no system role" in refusal
        assert "--system-role merge_into_user" in refusal
        assert not (tmp_path / "out" / "ifeval.json").exists()
        assert command(*arguments, "--system-role", "merge_into_user") == 0
    record = json.loads((tmp_path / "out" / "ifeval.json").read_text(encoding="utf-8"))
    assert (
        record["system"]["prompt_strict"]["value"] == record["user"]["prompt_strict"]["value"] == pytest.approx(8 / 12)
    )
    # These prompts are those of the control, word for word: a gap of 0 is no finding.
    note = "12 of 12 prompts equal those of the control, as merge_into_user makes them so"
    assert note in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


WITHHELD = [
    said("", "content_filter"),
    said(None, refusal="I can't help."),
    said("Half a", "SAFETY"),
    said("", "length"),
    said("", "tool_calls"),
    said("<think>Hm", "length"),
    said(""),
]


def test_withheld_answers_are_counted_as_refused_not_as_empty(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def script(asked: Asked) -> Reply:
        return WITHHELD[int(asked.prompt.split()[-1].strip("."))]

    data, out = write_rows(tmp_path / "s.jsonl", True, count=len(WITHHELD)), tmp_path / "out"
    with served(script) as server:
        assert command("ifeval", "--model", "m", "--server", server.url, "--data", data, "--output-dir", out) == 0
    endings = json.loads((out / "ifeval.json").read_text(encoding="utf-8"))["system"]["endings"]
    assert endings == {"refused": 3, "cut": 1, "calls a tool": 1, "without an end to its reasoning": 1, "empty": 1}
    assert "3 refused, 1 cut" in (out / "report.md").read_text(encoding="utf-8")


async def reasons_first(asked: Asked) -> Reply:
    """Refuse parameters as OpenAI's reasoning models do."""
    if asked.body.get("temperature", 1) != 1:
        message = "Unsupported value: 'temperature' does not support 0.0 with this model."
        return error(400, message, param="temperature", code="unsupported_value")
    if "max_tokens" in asked.body:
        return error(400, "Unsupported parameter: 'max_tokens'", param="max_tokens", code="unsupported_parameter")
    return said("A river")


def test_any_parameter_can_be_left_out_or_renamed(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path
) -> None:
    data, out = write_rows(tmp_path / "u.jsonl", False, count=1), tmp_path / "out"
    with served(reasons_first) as server:
        arguments = ("ifeval", "--model", "m", "--server", server.url, "--data", data, "--output-dir", out)
        assert "Leave it out: --temperature null." in says_no(*arguments)
        assert "write --temperature" in says_no(*arguments, "--extra", '{"temperature": 1}')
        seeded = (*arguments, "--temperature", "1")
        assert "`seed`: not set here: write --seed" in says_no(*seeded, "--extra", '{"seed": 5}')
        asked = len(server.asked)
        extra = {"max_tokens": None, "max_completion_tokens": 900, "reasoning_effort": "low"}
        assert command(*arguments, "--temperature", "null", "--extra", json.dumps(extra)) == 0
        (request,) = server.asked[asked:]
    sent = {name: value for name, value in request.body.items() if name not in ("model", "messages")}
    assert sent == {"max_completion_tokens": 900, "reasoning_effort": "low"}
    decoding = json.loads((out / "ifeval.json").read_text(encoding="utf-8"))["decoding"]
    assert decoding == {"max_new_tokens": 900, "temperature": None, "reasoning_effort": "low"}
    assert "Answers of at most 900 tokens at the model's own temperature" in (out / "report.md").read_text(
        encoding="utf-8"
    )


def test_a_killed_run_continues_from_its_answers(
    tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """15 prompts in two turns, batches of 4: after a kill at the fourth batch, only the other 18 are requested."""
    arguments = [
        *("ifeval", "--model", tiny_chat_model, "--data", SYSTEM, "--control", USER, "--limit", "15"),
        *("--max-new-tokens", "8", "--batch-size", "4"),
    ]
    assert check_killed_run(command, arguments, tmp_path, "ifeval", "ifeval_answers.jsonl") == (12, 30)
