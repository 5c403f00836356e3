"""scripts/evaluate.py turns: requests, figures recomputed from the rows, missing answers, and continuing after kill -9."""

import json
import math
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_batches import check_killed_run
from scripted_server import Asked, Reply, error, said, served
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.evaluation.turns.gain import draw_other_message
from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES, Rule
from train.pressure.turns import build_turns_set

ROOT = Path(__file__).parents[3]
RULE_OF = {message: rule for rule in RULES.values() for message in rule.messages("held_out")}
NUMBER_OF = {rule: number for number, rule in enumerate(RULES)}


def question_in(text: str) -> Question:
    return max((each for each in read_questions() if each.question in text), key=lambda each: len(each.question))


def breaks_at(rule: Rule, pushed_at: int | None) -> int:
    """Return the turn from which the scripted model drops a rule: early, late or never, and some when they are asked."""
    number = NUMBER_OF[rule.name]
    alone = 2 + number % 5
    return min(alone, pushed_at) if pushed_at and number % 2 else alone


async def drops_rules(asked: Asked) -> Reply:
    """Obey up to a turn; then answer in a plain sentence, or every third rule not at all."""
    system, *rest = asked.body["messages"]
    users = [message["content"] for message in rest if message["role"] == "user"]
    pushed_at = next((turn for turn, text in enumerate(users, 1) if question_in(text).question != text), None)
    rule, question = RULE_OF[system["content"]], question_in(users[-1])
    if len(users) < breaks_at(rule, pushed_at):
        return said(rule.apply(question.question, question.reference(rule.applies_to)))
    if NUMBER_OF[rule.name] % 3:
        return said(f"I would say: {question.answer} I hope so")
    return said("Let us rather talk about boats and trains")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "turns.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def dropped(command: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Asked]]:
    """The results of a model that drops rules, and its requests."""
    folder = tmp_path_factory.mktemp("dropped")
    with served(drops_rules) as server:
        assert command("turns", "--model", "m", "--server", server.url, "--output-dir", folder) == 0
        return folder, list(server.asked)


def test_every_figure_is_that_of_a_plain_loop_over_the_rows(dropped: tuple[Path, list[Asked]]) -> None:
    folder, _ = dropped
    record, rows = record_of(folder), lines(folder / "turns_rows.jsonl")
    assert len(rows) == 120
    for row in rows:  # the verdicts are those that the script was written for
        rule = RULES[row["rule"]]
        broken = breaks_at(rule, 3 if row["variant"] == "push_back" else None)
        assert row["held"] == [turn < broken for turn in range(1, 6)]
        assert row["answered"] == [held or NUMBER_OF[rule.name] % 3 > 0 for held in row["held"]]
    by_variant = {variant: [row for row in rows if row["variant"] == variant] for variant in ("plain", "push_back")}
    mean = lambda values: pytest.approx(sum(values) / len(values))  # noqa: E731
    for variant, of_variant in by_variant.items():
        for kind in ("all", "wording", "rule"):
            chosen = [row for row in of_variant if kind in ("all", row["held_out"])]
            figures = record[variant][kind]
            assert figures["conversations"] == len(chosen) == {"all": 60, "wording": 36, "rule": 24}[kind]
            runs = [next((turn for turn in range(5) if not row["held"][turn]), 5) for row in chosen]
            assert figures["run_length"]["mean"] == mean(runs)
            assert figures["run_share"] == mean([run / 5 for run in runs])
            for turn in range(5):
                assert figures["held"][turn]["mean"] == mean([row["held"][turn] for row in chosen])
                assert figures["held_through"][turn]["mean"] == mean([all(row["held"][: turn + 1]) for row in chosen])
                assert figures["answered"][turn]["mean"] == mean([row["answered"][turn] for row in chosen])
                for measure in ("held", "held_through", "answered"):
                    estimate = figures[measure][turn]
                    assert estimate["low"] <= estimate["mean"] <= estimate["high"]
                    assert estimate["groups"] == {"all": 26, "wording": 18, "rule": 8}[kind]
            left = [sum(run >= turn for run in runs) / len(runs) for turn in range(1, 6)]
            assert figures["half"]["turn"] == next((turn for turn in range(1, 6) if left[turn - 1] <= 0.5), None)
        for rule, of_rule in record[variant]["by_rule"].items():
            of_this = [row["held"] for row in of_variant if row["rule"] == rule]
            assert of_rule["conversations"] == len(of_this)
            assert of_rule["held"] == mean([held for row in of_this for held in row])
            assert of_rule["held_through"] == mean([all(row) for row in of_this])
    differences = record["difference"]["all"]
    paired = list(zip(by_variant["push_back"], by_variant["plain"], strict=True))
    assert differences["held"][:2] == [None, None]
    for turn in (2, 3, 4):
        change = [pushed["held"][turn] - plain["held"][turn] for pushed, plain in paired]
        assert differences["held"][turn]["mean"] == mean(change)
    assert differences["held"][2]["high"] < 0
    assert differences["held"][2]["p"] < 0.05
    change = [pushed["run_length"] - plain["run_length"] for pushed, plain in paired]
    assert differences["run_length"]["mean"] == mean(change)


def test_each_turn_is_asked_once_after_the_models_own_answers(dropped: tuple[Path, list[Asked]]) -> None:
    folder, asked = dropped
    rows = lines(folder / "turns_rows.jsonl")
    expected = set()
    for row in rows:
        for turn in range(5):
            texts = [row["system"]]
            for user, answer in zip(row["user"][:turn], row["answers"][:turn], strict=True):
                texts += [user, answer]
            expected.add(json.dumps([*texts, row["user"][turn]]))
    requests = [json.dumps([message["content"] for message in request.body["messages"]]) for request in asked]
    assert len(requests) == len(set(requests))  # the first turns of both variants are the same
    assert set(requests) == expected
    assert len(requests) == 60 * 5 + 60 * 3
    assert {request.body["max_tokens"] for request in asked} == {96}
    assert {request.body["temperature"] for request in asked} == {0}
    plain, pushed = (next(row for row in rows if row["variant"] == variant) for variant in ("plain", "push_back"))
    assert [a == b for a, b in zip(plain["user"], pushed["user"], strict=True)] == [True, True, False, True, True]


def test_the_report_shows_the_turns_and_a_conversation(dropped: tuple[Path, list[Asked]]) -> None:
    folder, _ = dropped
    report = (folder / "report.md").read_text(encoding="utf-8")
    record = record_of(folder)
    assert report.count("## Does the system message hold over several turns?") == 1
    assert f"| plain: holds | {100 * record['plain']['all']['held'][0]['mean']:.1f} % [" in report
    assert "60 conversations (36 of trained rules in held-out wordings, 24 of rules never trained) of 5 turns" in report
    assert "system gain" not in report  # the likelihoods of a server's model are not known
    sample = report.partition("A conversation (")[2]
    assert sample.count("- user: ") == sample.count("  - answer (") == 5
    assert "(holds, answered)" in sample
    assert "(does not hold, " in sample
    for name in ("turns.png",):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_asks_nothing(dropped: tuple[Path, list[Asked]], command: Callable[..., int]) -> None:
    folder, _ = dropped
    before = {name: (folder / name).read_bytes() for name in ("turns.json", "turns_rows.jsonl", "report.md")}
    with served(drops_rules) as server:
        assert command("turns", "--model", "m", "--server", server.url, "--output-dir", folder) == 0
        assert not server.asked
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_reference_history_obeys_whatever_the_model_answers(command: Callable[..., int], tmp_path: Path) -> None:
    async def refuses(asked: Asked) -> Reply:
        return error(400, "not this one") if len(asked.body["messages"]) == 4 else said("I would rather not say that")

    arguments = ("--conversations", "6", "--turns", "3", "--push-back-at", "null", "--history", "reference")
    with served(refuses) as server:
        assert command("turns", "--model", "m", "--server", server.url, "--output-dir", tmp_path, *arguments) == 0
        for request in server.asked:
            system, *rest = request.body["messages"]
            users, answers = rest[::2], rest[1::2]
            for user, answer in zip(users, answers, strict=False):
                assert RULE_OF[system["content"]].check(user["content"], answer["content"])
        assert len(server.asked) == 18
    record, rows = record_of(tmp_path), lines(tmp_path / "turns_rows.jsonl")
    assert [row["how"] for row in rows] == [["ended", "no answer", "ended"]] * 6  # it ends no conversation
    assert "push_back" not in record
    assert "difference" not in record
    assert {row["variant"] for row in rows} == {"plain"}
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert " Turns: 12 ended, 6 no answer." in report


@pytest.mark.parametrize(("turns", "pushed_at"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_the_default_push_back_is_in_a_turn_that_exists(
    command: Callable[..., int], tmp_path: Path, turns: int, pushed_at: int
) -> None:
    with served(drops_rules) as server:
        arguments = ("--conversations", "4", "--turns", turns, "--output-dir", tmp_path)
        assert command("turns", "--model", "m", "--server", server.url, *arguments) == 0
    assert record_of(tmp_path)["data"]["push_back_at"] == pushed_at
    for row in lines(tmp_path / "turns_rows.jsonl"):
        pushed = [question_in(text).question != text for text in row["user"]]
        assert pushed == [row["variant"] == "push_back" and turn == pushed_at for turn in range(1, turns + 1)]
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert ("1 turns" in report, "of 1 turn, " in report) == (False, turns == 1)


def test_an_unanswered_turn_ends_its_conversation(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    down = True

    async def answers_later(asked: Asked) -> Reply:
        odd = NUMBER_OF[RULE_OF[asked.body["messages"][0]["content"]].name] % 2
        if down and odd and len(asked.body["messages"]) == 4:
            return error(400, "out of order")
        return await drops_rules(asked)

    arguments = ["turns", "--model", "m", "--output-dir", tmp_path, "--conversations", "10", "--turns", "3"]
    with served(answers_later) as server:
        arguments += ["--server", server.url]
        assert command(*arguments) == 0
        shown = capsys.readouterr().out
        rows = lines(tmp_path / "turns_rows.jsonl")
        lost = [row for row in rows if NUMBER_OF[row["rule"]] % 2]
        assert 0 < len(lost) < len(rows) == 20
        for row in lost:
            assert row["how"][1:] == ["no answer", "not asked"]
            assert row["held"][1:] == row["answered"][1:] == [False, False]
            assert row["answers"][1:] == [None, None]
            assert "out of order" in row["why"][1]
        missing = (
            f"{2 * len(lost)} turns got no answer and count as not held ({len(lost)} of them come after such a turn)"
        )
        assert missing in shown
        assert shown.splitlines()[-1].startswith(f"warning: {missing}; the first (")
        asked = len(server.asked)
        down = False
        assert command(*arguments) == 0
        # Two turns of the plain conversations; of those with a push-back in turn 3 the last alone is another request.
        assert len(server.asked) - asked == 3 * len(lost) // 2
    assert {how for row in lines(tmp_path / "turns_rows.jsonl") for how in row["how"]} == {"ended"}
    assert "no answer" not in (tmp_path / "report.md").read_text(encoding="utf-8")


async def has_no_system_role(asked: Asked) -> Reply:
    """A server whose template refuses the role, like that of Gemma 2."""
    if asked.body["messages"][0]["role"] == "system":
        return error(400, "System role not supported")
    return said("A river")


def test_user_errors_say_what_to_write(
    command: Callable[..., int], says_no: Callable[..., str], tmp_path: Path, tiny_chat_model: Path
) -> None:
    arguments = ("turns", "--model", tiny_chat_model, "--output-dir", tmp_path)
    assert "--push-back-at 6: a conversation has 5 turns (--turns)" in says_no(*arguments, "--push-back-at", "6")
    assert "--turns 1000: 1000 turns need as many questions" in says_no(*arguments, "--turns", "1000")
    assert "there is no such folder" in says_no("turns", "--model", "nowhere/at/all")
    assert "--output-dir FOLDER" in says_no("turns", "--model", "some/model")
    assert "Allowed: own, reference" in says_no(*arguments, "--history", "mine")
    with served(has_no_system_role) as server:
        there = ("turns", "--model", "m", "--server", server.url, "--output-dir", tmp_path, "--conversations", "3")
        refusal = says_no(*there)
        assert "no first turn of the 6 conversations got an answer" in refusal
        assert "System role not supported. If the model has no system role" in refusal
        assert "--system-role merge_into_user" in refusal
        assert not (tmp_path / "turns.json").exists()
        assert command(*there, "--system-role", "merge_into_user") == 0
    assert record_of(tmp_path)["plain"]["endings"] == {"ended": 15}


def gains_by_hand(tokenizer: Any, model: torch.nn.Module, row: dict[str, Any], other: str) -> list[list[float]]:
    """Return for each turn the gain over another message and over none, with the text written out here."""

    def likelihood(system: str, turn: int) -> tuple[float, int]:
        prompt = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        for user, answer in zip(row["user"][:turn], row["references"][:turn], strict=True):
            prompt += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        prompt += f"<|im_start|>user\n{row['user'][turn]}<|im_end|>\n<|im_start|>assistant\n"
        before, answer = (tokenizer(text)["input_ids"] for text in (prompt, row["references"][turn] + "<|im_end|>"))
        with torch.no_grad():
            scores = model(torch.tensor([before + answer])).logits[0, len(before) - 1 :].log_softmax(-1)
        return math.fsum(float(scores[place, token]) for place, token in enumerate(answer)), len(answer)

    gains = []
    for turn in range(len(row["user"])):
        own, tokens = likelihood(row["system"], turn)
        gains.append([(own - likelihood(system, turn)[0]) / tokens for system in (other, "")])
    return gains


def test_gains_of_each_turn_are_those_of_a_plain_loop(
    command: Callable[..., int], tiny_chat_model: Path, tmp_path: Path
) -> None:
    arguments = ("turns", "--model", tiny_chat_model, "--conversations", "4", "--turns", "3", "--push-back-at", "2",
                 "--max-new-tokens", "4", "--output-dir", tmp_path)  # fmt: skip
    assert command(*arguments) == 0
    record, rows = record_of(tmp_path), lines(tmp_path / "turns_rows.jsonl")
    conversations = {(row.key, "plain"): row.plain for row in build_turns_set(4, 3, 2)}
    conversations |= {(row.key, "push_back"): row.push_back for row in build_turns_set(4, 3, 2)}
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    exact = AutoModelForCausalLM.from_pretrained(tiny_chat_model).double()
    expected = {"plain": [], "push_back": []}
    for row in rows:
        conversation = conversations[row["conversation"], row["variant"]]
        other = draw_other_message(conversation, 0)
        assert RULE_OF[other].name != row["rule"]
        assert other == draw_other_message(conversations[row["conversation"], "plain"], 0)
        gains = gains_by_hand(tokenizer, exact, row, other)
        assert [[turn[0], turn[2]] for turn in row["gains"]] == [pytest.approx(turn, abs=1e-4) for turn in gains]
        assert [turn[1] for turn in row["gains"]] == [float(turn[0] > 0) for turn in gains]
        expected[row["variant"]].append(gains)
    for variant, of_variant in expected.items():
        for turn in range(3):
            for place, name in enumerate(("gain", "gain_over_none")):
                mean = statistics.fmean(gains[turn][place] for gains in of_variant)
                assert record[variant]["gain"][name][turn]["mean"] == pytest.approx(mean, abs=1e-4)
    assert "plain: system gain over another rule's message" in (tmp_path / "report.md").read_text(encoding="utf-8")
    scores = (tmp_path / "turns_scores.jsonl").read_text(encoding="utf-8").split()
    assert command(*arguments) == 0
    assert (tmp_path / "turns_scores.jsonl").read_text(encoding="utf-8").split() == scores  # none is scored again


def test_a_killed_run_continues_at_its_turn(tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int]) -> None:
    """6 conversations: turn 1 is 6 answers, turns 2 and 3 are 12; killed at the fourth batch of 4, in turn 2."""
    arguments = [
        *("turns", "--model", tiny_chat_model, "--conversations", "6", "--turns", "3", "--push-back-at", "2"),
        *("--max-new-tokens", "8", "--batch-size", "4", "--no-gain"),
    ]
    assert check_killed_run(command, arguments, tmp_path, "turns", "turns_rows.jsonl") == (10, 30)
    assert {row["gains"] for row in lines(tmp_path / "whole" / "turns_rows.jsonl")} == {None}  # --no-gain


def test_two_models_are_compared_by_conversation(
    dropped: tuple[Path, list[Asked]],
    command: Callable[..., int],
    says_no: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def always_holds(asked: Asked) -> Reply:
        rule, question = RULE_OF[asked.body["messages"][0]["content"]], question_in(asked.prompt)
        return said(rule.apply(question.question, question.reference(rule.applies_to)))

    folder, _ = dropped
    better = tmp_path / "better"
    with served(always_holds) as server:
        arguments = ("turns", "--model", "b", "--server", server.url, "--output-dir", better)
        assert command(*arguments) == 0
        assert record_of(better)["push_back"]["all"]["half"] == {"turn": None, "low": None, "high": None}
        assert "| none within 5 | none within 5 |" in (better / "report.md").read_text(encoding="utf-8")
        assert command("compare", folder, better) == 0
        assert "| turns: push-back: holds in all 5 turns | " in capsys.readouterr().out
        assert (better / "turns_compare.png").read_bytes().startswith(b"\x89PNG")
        record = json.loads((better / "compare.json").read_text(encoding="utf-8"))
        pairs = {pair["measure"]: pair for pair in record["measures"]}
        pushed = [row for row in lines(folder / "turns_rows.jsonl") if row["variant"] == "push_back"]
        change = statistics.fmean(1 - all(row["held"]) for row in pushed)
        assert pairs["push-back: holds in all 5 turns"]["paired"]["mean"] == pytest.approx(change)
        assert pairs["push-back: holds in all 5 turns"]["paired"]["groups"] == 26
        assert pairs["push-back: holds in all 5 turns"]["rows"] == 60
        never = statistics.fmean(row["held"][2] for row in pushed if row["held_out"] == "rule")
        assert pairs["push-back, rules never trained: holds in turn 3"]["a"]["value"] == pytest.approx(never)
        other = tmp_path / "other"
        assert command(*arguments[:-1], other, "--history", "reference") == 0
        assert "history" in says_no("compare", folder, other)
        assert command(*arguments[:-1], tmp_path / "few", "--conversations", "6", "--turns", "4") == 0
        refusal = says_no("compare", folder, tmp_path / "few")
        assert "turns: conversations: number is 60 and 6, turns is 5 and 4. Measure both" in refusal
        assert command(*arguments[:-1], tmp_path / "seed", "--seed", "1") == 0
        assert "turns: conversations: seed is 0 and 1. " in says_no("compare", folder, tmp_path / "seed")
    shutil.copy(folder / "turns.json", other / "turns.json")
    assert "the rows beside it belong to another run" in says_no("compare", other, better)
