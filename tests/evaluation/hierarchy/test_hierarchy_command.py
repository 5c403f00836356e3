"""scripts/evaluate.py hierarchy: requests, figures recomputed from the rows, tool results, and continuing after kill -9."""

import json
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from killed_batches import check_killed_run
from scripted_server import Asked, Reply, error, said, served

from train.pressure.evaluation_set import VERSION, PressureRow, build_rows
from train.pressure.selection import select_rows
from train.pressure.tactics import SETTINGS, tactics

ROOT = Path(__file__).parents[3]
ROWS = build_rows()
PER_SETTING = 30


def texts(messages: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(message["content"] for message in messages if message["content"])


BY_TEXTS = {texts(row.messages): row for row in ROWS}


def reply_to(row: PressureRow) -> Reply:
    """Reply to each row in one of eight ways, which its key decides."""
    way = random.Random(row.key).randrange(9)
    if way == 0:
        return error(400, "this prompt is refused")
    replies = {
        1: row.reference(),
        2: row.question.answer,
        3: "I'm sorry, but I can't help with that.",
        4: f"{row.reference()} {row.pressure.secret}",
        5: "",
        6: row.messages[0]["content"],
        7: row.rule.apply(row.question.question, "Nobody knows"),
        8: row.reference(),
    }
    return said(replies[way], "length" if way == 6 else "stop")


async def answers_in_eight_ways(asked: Asked) -> Reply:
    return reply_to(BY_TEXTS[texts(asked.body["messages"])])


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "hierarchy.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(command: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A run against the server, run twice: its folder, the requests of the first run, and those of the second."""
    out = tmp_path_factory.mktemp("hierarchy")
    with served(answers_in_eight_ways) as server:
        arguments = ("hierarchy", "--model", "m", "--server", server.url, "--rows", PER_SETTING, "--output-dir", out)
        assert command(*arguments) == 0
        first = len(server.asked)
        assert {(asked.body["temperature"], asked.body["max_tokens"]) for asked in server.asked} == {(0, 128)}
        before = read_record(out)
        assert command(*arguments) == 0
        assert read_record(out) == before
        second = server.asked[first:]
    assert {json.dumps(asked.body["messages"]) for asked in second} <= {
        json.dumps(asked.body["messages"]) for asked in server.asked[:first]
    }
    return out, first, len(second)


def test_only_rows_without_an_answer_are_asked_again(measured: tuple[Path, int, int]) -> None:
    out, _, second = measured
    lines = read_lines(out / "hierarchy_rows.jsonl")
    missing = [line for line in lines if line["why"]]
    assert len(missing) > 3
    assert second == len(missing)
    assert all((line["held"], line["answered"], line["how"]) == (False, False, "no answer") for line in missing)
    silent = [line for line in lines if not (line["answer"] or "").strip()]
    assert {line["how"] for line in silent} == {"empty", "no answer"}
    # An empty answer has neither kept a secret nor told it.
    assert {line["secret_kept"] for line in silent} == {None}
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"{len(missing)} rows got no answer and count as neither held nor answered; the first (" in report


def test_rows_have_the_verdicts_on_their_answers(measured: tuple[Path, int, int]) -> None:
    lines = read_lines(measured[0] / "hierarchy_rows.jsonl")
    rows = {row.key: row for row in ROWS}
    assert len(lines) == 6 * PER_SETTING == len({line["key"] for line in lines})
    for line in lines:
        row = rows[line["key"]]
        assert (line["set"], line["setting"], line["tactic"]) == ("pressure", row.pressure.setting, row.pressure.tactic)
        assert line["split"] == ("rule" if row.rule.held_out else {"seen": "seen", "held_out": "wording"}[row.split])
        assert texts(line["messages"]) == texts(row.messages)
        if line["answer"] is not None:
            verdict = row.judge(line["answer"])
            assert (line["held"], line["answered"]) == (verdict.held, verdict.answered)
            assert line["refused"] == verdict.refused
            assert line["secret_kept"] == (verdict.secret_kept if line["answer"] else None)
    for setting in SETTINGS:
        verdicts = {(line["held"], line["answered"]) for line in lines if line["setting"] == setting}
        assert len(verdicts) >= 3  # the test below would not see a confusion of figures otherwise


def counts(line: dict[str, Any], measure: str) -> int:
    return int(line["held"] and line["answered"]) if measure == "both" else int(line[measure])


def check_shares(
    shares: dict[str, Any], lines: list[dict[str, Any]], references: dict[str, dict[str, Any]] | None = None
) -> None:
    is_paired = references is not None and lines[0]["setting"] != "reference"
    assert ("minus_reference" in shares) == is_paired
    for measure, difference in shares.get("minus_reference", {}).items():
        total = 0
        for line in lines:
            total += counts(line, measure) - counts(references[line["group"]], measure)
        assert difference["mean"] == pytest.approx(total / len(lines))
        assert 0 < difference["p"] <= 1
    assert shares["rows"] == len(lines)
    assert shares["refused"] == sum(line["refused"] for line in lines)
    by_measure = dict.fromkeys(("held", "answered", "both"), lines)
    if kept := [line for line in lines if line["secret_kept"] is not None]:
        by_measure["secret_kept"] = kept
        assert shares["secret_kept"]["rows"] == len(kept)
    assert ("secret_kept" in shares) == ("secret_kept" in by_measure)
    for measure, counted in by_measure.items():
        share = shares[measure]
        assert share["value"] == pytest.approx(sum(counts(line, measure) for line in counted) / len(counted))
        assert share["groups"] == len({line["question"] for line in counted})
        if share["groups"] < 6:
            assert (share["low"], share["high"]) == (None, None)
        else:
            assert share["low"] <= share["value"] <= share["high"]


def test_every_figure_equals_a_plain_recomputation_from_the_rows(measured: tuple[Path, int, int]) -> None:
    out = measured[0]
    record = read_record(out)["pressure"]
    lines = read_lines(out / "hierarchy_rows.jsonl")
    references = {line["group"]: line for line in lines if line["setting"] == "reference"}
    assert set(record["settings"]) == set(SETTINGS)
    for setting, shares in record["settings"].items():
        of_setting = [line for line in lines if line["setting"] == setting]
        check_shares(shares, of_setting, references)
        assert set(shares["by_tactic"]) == set(tactics(setting))
        for tactic, of_tactic in shares["by_tactic"].items():
            check_shares(of_tactic, [line for line in of_setting if line["tactic"] == tactic], references)
        for difference in shares.get("minus_reference", {}).values():
            assert difference["low"] <= difference["mean"] <= difference["high"]
    for name, key in (("by_split", "split"), ("by_rule", "rule")):
        assert set(record[name]) == {line[key] for line in lines}
        for value, by_setting in record[name].items():
            for setting, shares in by_setting.items():
                selected = [line for line in lines if (line[key], line["setting"]) == (value, setting)]
                check_shares(shares, selected, references if name == "by_split" else None)
    data = record["data"]
    assert data["by_setting"] == dict.fromkeys(SETTINGS, PER_SETTING)
    endings: dict[str, int] = defaultdict(int)
    for line in lines:
        endings[line["how"]] += 1
    assert data["endings"] == endings
    assert set(endings) == {"ended", "cut", "empty", "no answer"}


def test_an_interval_is_that_of_a_plain_bootstrap_over_questions(measured: tuple[Path, int, int]) -> None:
    out = measured[0]
    lines = [line for line in read_lines(out / "hierarchy_rows.jsonl") if line["setting"] == "conflict"]
    by_question: dict[str, list[int]] = defaultdict(list)
    for line in lines:
        by_question[line["question"]].append(int(line["answered"]))
    rng = random.Random(1)
    means = []
    for _ in range(2_000):
        drawn = [value for _ in by_question for value in rng.choice(list(by_question.values()))]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    share = read_record(out)["pressure"]["settings"]["conflict"]["answered"]
    assert (share["low"], share["high"]) == pytest.approx((means[50], means[-50]), abs=0.04)


def test_the_report_has_the_table_the_samples_and_the_plot(measured: tuple[Path, int, int]) -> None:
    out = measured[0]
    report = (out / "report.md").read_text(encoding="utf-8")
    record = read_record(out)
    assert report.count("## Does the system message hold?") == 1
    names = [part["name"] for part in record["table"]]
    assert names == [
        "reference", "aligned", "conflict", "injected", "extraction", "extraction: secret kept", "permitted",
    ]  # fmt: skip
    with_text = [line for line in read_lines(out / "hierarchy_rows.jsonl") if line["secret_kept"] is not None]
    rows = {part["name"]: part["rows"] for part in record["table"]}
    assert rows.pop("extraction: secret kept") == len(with_text) < PER_SETTING
    assert set(rows.values()) == {PER_SETTING}
    assert "Secret kept: of the answers that are not empty." in report
    for part in record["table"]:
        assert f"| {part['name']} | {part['rows']} | {100 * part['held']['value']:.1f} % [" in report
    for setting in ("conflict", "injected", "extraction", "permitted"):
        assert f"- {setting}, " in report
    assert "| permitted | choice | " in report
    assert "tool results are turns of their own" in report
    assert (out / "hierarchy.png").read_bytes().startswith(b"\x89PNG")


def test_a_prefix_is_balanced_and_paired() -> None:
    assert {row.key for row in select_rows(ROWS, SETTINGS)} == {row.key for row in ROWS}
    for count in (26, 52, 104, 208):
        rows = select_rows(ROWS, ["reference", "conflict", "permitted"], None, count)
        by_setting: dict[str, list[PressureRow]] = defaultdict(list)
        for row in rows:
            by_setting[row.pressure.setting].append(row)
        references = {row.group for row in by_setting["reference"]}
        for setting in ("conflict", "permitted"):
            of_setting = by_setting[setting]
            assert len(of_setting) == count
            assert {row.group for row in of_setting} == references
            rules, used = defaultdict(int), defaultdict(int)
            for row in of_setting:
                rules[row.rule.name] += 1
                used[row.pressure.tactic] += 1
            assert set(rules.values()) == {count / 26}
            assert max(used.values()) - min(used.values()) <= 2, used
        if count <= 104:
            seen = sum(row.split == "seen" for row in by_setting["conflict"] if not row.rule.held_out)
            assert seen == pytest.approx(count * 18 / 26 / 2, abs=4)
    assert select_rows(ROWS, ["conflict", "conflict"]) == select_rows(ROWS, ["conflict"])
    held_out = select_rows(ROWS, ["conflict"], "held_out")
    assert {row.split for row in held_out} == {"held_out"}
    assert len(held_out) == 5 * (18 * 2 + 8 * 4)


async def has_no_tool_role(asked: Asked) -> Reply:
    if any(message["role"] == "tool" for message in asked.body["messages"]):
        return error(400, "Only user and assistant roles are supported")
    return said("A river.")


def test_refused_tool_results_stand_in_the_user_turn(command: Callable[..., int], tmp_path: Path) -> None:
    with served(has_no_tool_role) as server:
        arguments = ("hierarchy", "--model", "m", "--server", server.url, "--settings", "injected", "--rows", "60",
                     "--output-dir", tmp_path)  # fmt: skip
        assert command(*arguments) == 0
        asked = [json.dumps(asked.body["messages"]) for asked in server.asked]
        first = read_record(tmp_path)
        assert command(*arguments) == 0
        again = [asked.body["messages"] for asked in server.asked[len(asked) :]]
    assert read_record(tmp_path) == first
    assert len(again) == 30  # the refused ones, which no journal has
    assert all(any(message["role"] == "tool" for message in messages) for messages in again)
    results = read_record(tmp_path)["pressure"]["data"]["tool_results"]
    assert results == {"rows": 30, "in": "user turn", "why": results["why"]}
    assert "Only user and assistant roles are supported" in results["why"]
    lines = [line for line in read_lines(tmp_path / "hierarchy_rows.jsonl") if line["tactic"] == "tool"]
    rows = {row.key: row for row in ROWS}
    for line in lines:
        question, result = line["question"], rows[line["key"]].messages[-1]["content"]
        assert [message["role"] for message in line["messages"]] == ["system", "user"]
        assert line["messages"][1]["content"] == f"{question}\n\nResult of the search:\n{result}"
        assert (line["why"], line["answer"]) == (None, "A river.")
        assert json.dumps(line["messages"]) in asked
    assert len(lines) == 30
    assert "30 tool results stand in the user's turn: " in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_server_gets_the_arguments_of_tool_calls_as_text(measured: tuple[Path, int, int]) -> None:
    lines = [line for line in read_lines(measured[0] / "hierarchy_rows.jsonl") if line["tactic"] == "tool"]
    for line in lines:
        _, user, call, result = line["messages"]
        assert json.loads(call["tool_calls"][0]["function"]["arguments"]) == {"query": user["content"]}
        assert call["tool_calls"][0]["id"] == result["tool_call_id"]


async def has_no_system_role(asked: Asked) -> Reply:
    if asked.body["messages"][0]["role"] == "system":
        return error(400, "System role not supported")
    return said("A river.")


def test_a_server_without_a_system_role_gets_advice(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(has_no_system_role) as server:
        arguments = ("hierarchy", "--model", "m", "--server", server.url, "--rows", "4", "--output-dir", tmp_path / "o")
        assert command(*arguments) == 2
        refusal = capsys.readouterr().err
        assert "System role not supported" in refusal
        assert "--system-role merge_into_user" in refusal
        assert not (tmp_path / "o" / "hierarchy.json").exists()
        assert command(*arguments, "--system-role", "merge_into_user") == 0
    assert read_record(tmp_path / "o")["pressure"]["data"]["endings"] == {"ended": 24}
    assert " 2 tool results are turns of their own." in (tmp_path / "o" / "report.md").read_text(encoding="utf-8")


def test_a_single_tool_result_is_singular(command: Callable[..., int], tmp_path: Path) -> None:
    for script, text in (
        (answers_in_eight_ways, "1 tool result is a turn of its own."),
        (has_no_tool_role, "1 tool result stands in the user's turn: "),
    ):
        out = tmp_path / script.__name__
        with served(script) as server:
            arguments = ("--server", server.url, "--settings", "injected", "--rows", "2", "--output-dir", out)
            assert command("hierarchy", "--model", "m", *arguments) == 0
        assert f" {text}" in (out / "report.md").read_text(encoding="utf-8")


def test_a_setting_without_any_answer_is_an_error(says_no: Callable[..., str], tmp_path: Path) -> None:
    """A setting that was never answered has no share of 0 %."""

    async def refuses_secrets(asked: Asked) -> Reply:
        row = BY_TEXTS[texts(asked.body["messages"])]
        return error(400, "too secret") if row.pressure.setting == "extraction" else said("A river.")

    with served(refuses_secrets) as server:
        refusal = says_no("hierarchy", "--model", "m", "--server", server.url, "--rows", "4", "--output-dir", tmp_path)
    assert "none of the 4 rows of the setting extraction got an answer. Reason of the first: " in refusal
    assert "too secret" in refusal
    assert not (tmp_path / "hierarchy.json").exists()


def test_user_errors_are_reported_before_the_first_request(says_no: Callable[..., str], tmp_path: Path) -> None:
    server = ("--server", "http://localhost:1/v1", "--output-dir", tmp_path)
    assert "--output-dir FOLDER" in says_no("hierarchy", "--model", "some/model")
    assert "--settings begging: found 'begging'. Allowed: " in says_no(
        "hierarchy", "--model", "m", "--settings", "begging", *server
    )
    assert "an integer >= 1" in says_no("hierarchy", "--model", "m", "--rows", "0", *server)
    refusal = says_no("hierarchy", "--model", "m", "--settings", "conflict", "begging", *server)
    assert "begging" in refusal
    assert all(setting in refusal for setting in SETTINGS)
    assert "held_out" in says_no("hierarchy", "--model", "m", "--split", "both", *server)


def test_the_gap_of_s_ifeval_stands_in_the_same_table(command: Callable[..., int], tmp_path: Path) -> None:
    share = {"value": 0.5, "low": 0.3, "high": 0.7, "of": 40, "prompts": 40, "interval": "wilson"}
    gap = {"mean": -0.2, "low": -0.3, "high": -0.1, "p": 0.01, "groups": 40, "interval": "bootstrap"}
    ifeval = {
        "kind": "ifeval",
        "model": "m",
        "system": {"prompt_strict": share},
        "user": {"prompt_strict": share | {"value": 0.7}},
        "gap": {"prompt_strict": gap},
    }
    (tmp_path / "ifeval.json").write_text(json.dumps(ifeval), encoding="utf-8")
    with served(answers_in_eight_ways) as server:
        arguments = (
            "hierarchy",
            "--server",
            server.url,
            "--settings",
            "aligned",
            "--rows",
            "4",
            "--output-dir",
            tmp_path,
        )
        assert command(*arguments, "--model", "m") == 0
        table = {part["name"]: part for part in read_record(tmp_path)["table"]}
        assert set(table) == {
            "aligned", "S-IFEval: constraints in the system message", "S-IFEval: the same in the user turn",
        }  # fmt: skip
        system = table["S-IFEval: constraints in the system message"]
        assert (system["rows"], system["held"]["value"], system["difference"]) == (40, 0.5, gap)
        report = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert "| 40 | 50.0 % [30.0, 70.0] |  |  | -20.0 [-30.0, -10.0] | 0.0100 |" in report
        assert command(*arguments, "--model", "another") == 0
        assert [part["name"] for part in read_record(tmp_path)["table"]] == ["aligned"]
        report = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert "S-IFEval is not in the table: ifeval.json is of the model m." in report
        (tmp_path / "ifeval.json").write_text(json.dumps(ifeval | {"model_files": "others"}), encoding="utf-8")
        assert command(*arguments, "--model", "m") == 0
        report = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert "S-IFEval is not in the table: ifeval.json is of other files of the model m." in report


def test_results_of_two_models_in_a_folder_are_never_mixed_silently(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def answers(asked: Asked) -> Reply:
        return said("A river.")

    def measure(name: str, model: str, *options: str) -> str:
        assert command(name, "--model", model, "--server", server.url, "--output-dir", tmp_path, *options) == 0
        return capsys.readouterr().out

    hierarchy = ("--settings", "aligned", "--rows", "4")
    turns = ("--conversations", "2", "--turns", "2")
    with served(answers) as server:
        assert "another model" not in measure("hierarchy", "a", *hierarchy)
        assert "another model" not in measure("hierarchy", "a", *hierarchy)
        shown = measure("turns", "b", *turns)
        assert shown.startswith(f"warning: {tmp_path} has results of another model: hierarchy of a. This run is of b. ")
        report = (tmp_path / "report.md").read_text(encoding="utf-8")
        assert re.findall(r"^Model: (.*)$", report, re.MULTILINE) == ["`a`.", "`b`."]
        assert "These results are of several models: hierarchy of `a`, turns of `b`." in report
        other = tmp_path / "other"
        measure("turns", "b", *turns, "--output-dir", str(other))
        capsys.readouterr()
        assert command("compare", other, tmp_path) == 0
        shown = capsys.readouterr().out
        assert "note: B has results of several models: hierarchy of a, turns of b" in shown
        assert "note: A has results" not in shown
        assert "another model: turns of b" in measure("hierarchy", "a", *hierarchy)
        measure("turns", "a", *turns)
        assert "## Results of several models" not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_compare_pairs_rows_and_refuses_other_rows(
    command: Callable[..., int],
    says_no: Callable[..., str],
    measured: tuple[Path, int, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def obeys(asked: Asked) -> Reply:
        return said(BY_TEXTS[texts(asked.body["messages"])].reference())

    first, second = measured[0], tmp_path / "second"
    with served(obeys) as server:
        arguments = ("hierarchy", "--model", "n", "--server", server.url, "--output-dir", second)
        assert command(*arguments, "--rows", PER_SETTING) == 0
        assert (
            command(*arguments, "--rows", PER_SETTING, "--settings", "conflict", "--output-dir", tmp_path / "less") == 0
        )
    capsys.readouterr()
    assert command("compare", first, second) == 0
    shown = capsys.readouterr().out
    entries = {entry["measure"]: entry for entry in json.loads((second / "compare.json").read_text())["measures"]}
    keyed = [{line["key"]: line for line in read_lines(folder / "hierarchy_rows.jsonl")} for folder in (first, second)]
    conflicts = [key for key, line in keyed[0].items() if line["setting"] == "conflict"]
    for measure, label in (("held", "held"), ("answered", "answered"), ("both", "held and answered")):
        total = sum(counts(keyed[1][key], measure) - counts(keyed[0][key], measure) for key in conflicts)
        assert entries[f"conflict: {label}"]["paired"]["mean"] == pytest.approx(total / PER_SETTING)
        assert entries[f"conflict: {label}"]["rows"] == PER_SETTING
        assert entries[f"conflict: {label}"]["b"]["value"] == 1
    assert entries["conflict minus reference: held"]["unit"] == "points"
    assert entries["extraction: secret kept"]["b"]["value"] == 1
    assert {
        "conflict, capitals: held",
        "conflict, ignore: held and answered",
        "conflict, rules never trained: held",
    } <= set(entries)
    assert "| hierarchy: conflict: held and answered | " in shown
    assert "conflict, capitals" not in shown
    refusal = says_no("compare", first, tmp_path / "less")
    others = ", ".join(f"{setting} is {PER_SETTING} and 0" for setting in ("reference", "aligned", "injected"))
    assert f"hierarchy: rows: {others} (and 2 more). Measure both" in refusal
    assert 'hierarchy: rows: split is "all" and "seen". ' in says_no("compare", first, changed(second, split="seen"))
    older = says_no("compare", first, changed(second, version=0))
    assert f"hierarchy: rows: version is {VERSION} and 0. " in older
    assert "hierarchy: rows: contents differ. " in says_no("compare", first, changed(second, fingerprint="another"))


def changed(folder: Path, **keys: Any) -> Path:
    """Return a copy of results with other keys, as another run would have written them."""
    copy = folder.with_name(f"{folder.name}-{'-'.join(keys)}")
    shutil.copytree(folder, copy)
    record = read_record(copy)
    record["pressure"]["data"] |= {"fingerprint": "another"} | keys
    (copy / "hierarchy.json").write_text(json.dumps(record | keys), encoding="utf-8")
    return copy


def test_a_killed_run_continues_from_its_answers(
    tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int]
) -> None:
    """Six settings of 4 rows, batches of 5: after a kill at the fourth batch, only the other 9 are generated."""
    arguments = ["hierarchy", "--model", tiny_chat_model, "--rows", "4", "--max-new-tokens", "6", "--batch-size", "5"]
    assert check_killed_run(command, arguments, tmp_path, "hierarchy", "hierarchy_rows.jsonl") == (15, 24)
    # ChatML has no tool turns.
    results = read_record(tmp_path / "whole")["pressure"]["data"]["tool_results"]
    assert (results["rows"], results["in"]) == (2, "user turn")
    assert "has no turn for the role tool" in results["why"]
