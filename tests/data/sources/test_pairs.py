"""Pairs: every shape of a row with a chosen and a rejected answer gives the two conversations written here by hand."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from train.data.sources.formats import Conversation, RowError, detect
from train.data.sources.pairs import PREFERENCE, detect_with_pairs, read_pair
from train.data.sources.source import read_rows
from train.errors import UserError
from train.multifaceted.collection.instructions import Instruction
from train.multifaceted.collection.result import InstructionResult, SetResult, build_pairs
from train.recipe import Source


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, USER = turn("system", "Be brief."), turn("user", "What is tea?")
GOOD, BAD = turn("assistant", "A drink."), turn("assistant", "Tea is a drink that is made of leaves.")
COLUMNS = {"system": "Be brief.", "prompt": "What is tea?"}

# Rows of one pair: the system message, the question, the short answer over the long one.
SAME_PAIR: dict[str, dict[str, Any]] = {
    "hub's Multifaceted-Collection-DPO and -ORPO": {
        **COLUMNS,
        "main_source": "OpenHermesPreferences",
        "original_source": "glaive-code-assist",
        "chosen": [{"content": "What is tea?", "role": "user"}, {"content": "A drink.", "role": "assistant"}],
        "rejected": [{"content": "What is tea?", "role": "user"}, {"content": BAD["content"], "role": "assistant"}],
    },
    "complete conversations": {"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]},
    "complete conversations as JSON": {
        "chosen": json.dumps([SYSTEM, USER, GOOD]),
        "rejected": json.dumps([SYSTEM, USER, BAD]),
    },
    "prompt as turns (TRL)": {"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]},
    "prompt as turns, answers as turns": {"prompt": [SYSTEM, USER], "chosen": GOOD, "rejected": BAD},
    "texts": {**COLUMNS, "chosen": "A drink.", "rejected": BAD["content"]},
    "texts, Intel/orca_dpo_pairs": {
        "system": "Be brief.",
        "question": "What is tea?",
        "chosen": "A drink.",
        "rejected": BAD["content"],
    },
    "texts, distilabel's input": {
        "system": "Be brief.",
        "input": "What is tea?",
        "chosen": "A drink.",
        "rejected": BAD["content"],
    },
    "LLaMA-Factory's sharegpt": {
        "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "What is tea?"}],
        "chosen": {"from": "gpt", "value": "A drink."},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    },
    "answers as turns, beside a text and the chosen conversation": {
        **COLUMNS,
        "messages": [SYSTEM, USER, GOOD],
        "chosen": [GOOD],
        "rejected": [BAD],
    },
    "one half complete": {**COLUMNS, "chosen": [USER, GOOD], "rejected": BAD["content"]},
    "ultrafeedback_binarized": {
        "prompt": "What is tea?",
        "messages": [SYSTEM, USER, GOOD],
        "chosen": [SYSTEM, USER, GOOD],
        "rejected": [SYSTEM, USER, BAD],
        "score_chosen": 8.0,
    },
}


def test_transcripts_are_conversations() -> None:
    """As in Anthropic/hh-rlhf: all turns in one text, and the turns before the last one in both."""
    before = "\n\nHuman: Hi.\n\nAssistant: Hello! Which of these:\n\n- tea\n\nHuman: What is tea?\n\nAssistant:"
    pair = read_pair({"chosen": f"{before} A drink.", "rejected": f"{before} {BAD['content']}"}, "hh:1")
    prompt = [turn("user", "Hi."), turn("assistant", "Hello! Which of these:\n\n- tea"), USER]
    assert [{**message, "train": True} for message in pair.chosen.messages] == [
        {**message, "train": True} for message in (*prompt, GOOD)
    ]
    assert pair.rejected.messages[-1] == BAD
    assert pair.answer == 3
    in_prose = read_pair({**COLUMNS, "chosen": "Human: is a word.", "rejected": "Say\n\nHuman: hello"}, "x:1")
    assert [message["content"] for message in in_prose.rejected.messages[2:]] == ["Say\n\nHuman: hello"]


@pytest.mark.parametrize("name", SAME_PAIR)
def test_all_shapes_of_a_pair_give_the_same_conversations(name: str) -> None:
    row = SAME_PAIR[name]
    before = copy.deepcopy(row)
    assert detect_with_pairs(row) == PREFERENCE
    pair = read_pair(row, ":3")
    assert pair.chosen == Conversation([SYSTEM, USER, GOOD], None, ":3")
    assert pair.rejected == Conversation([SYSTEM, USER, BAD], None, ":3")
    assert pair.answer == 2
    assert row == before


def test_the_pairs_of_our_collection_are_read() -> None:
    instruction = Instruction(":1", "source", "original", prompt="What is tea?", number=0)
    sets = [
        SetResult(number, [], system=system, output=output)
        for number, (system, output) in enumerate((("Be brief.", "A drink."), ("Be long.", BAD["content"])))
    ]
    rows = build_pairs(InstructionResult(instruction, sets), "all", seed=1)
    assert len(rows) == 2
    read = [read_pair(row, "") for row in rows]
    for pair, system, own, other in (read[0], "Be brief.", GOOD, BAD), (read[1], "Be long.", BAD, GOOD):
        assert pair.chosen.messages == [turn("system", system), USER, own]
        assert pair.rejected.messages == [turn("system", system), USER, other]


def test_the_pairs_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    """As the hub has them: lists of structs."""
    rows = [SAME_PAIR["hub's Multifaceted-Collection-DPO and -ORPO"]] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "train-00000-of-00001.parquet")
    read = [row for _, row in read_rows(Source(path=str(tmp_path)))]
    assert [read_pair(row, "") for row in read] == [read_pair(row, "") for row in rows]
    unread: dict[str, list[Any]] = {}
    read_pair(read[0], "", unread=unread)
    assert unread.keys() == {"main_source", "original_source"}


def test_the_prompt_is_what_both_halves_begin_with_and_its_answers_are_not_trained() -> None:
    history = [USER, GOOD, turn("user", "And coffee?")]
    row = {"chosen": [*history, turn("assistant", "Too.")], "rejected": [*history, turn("assistant", "No.")]}
    pair = read_pair(row, "")
    assert pair.answer == 3
    for half, answer in (pair.chosen, "Too."), (pair.rejected, "No."):
        assert half.messages == [USER, {**GOOD, "train": False}, history[2], turn("assistant", answer)]


def test_answers_of_several_turns_are_all_trained() -> None:
    more = [turn("user", "And?"), turn("assistant", "Hot.")]
    pair = read_pair({"prompt": [USER], "chosen": [GOOD, *more], "rejected": [BAD]}, "")
    assert pair.answer == 1
    assert pair.chosen.messages == [USER, GOOD, *more]
    assert pair.rejected.messages == [USER, BAD]


def test_tools_history_and_context_belong_to_both_halves() -> None:
    tools = [{"type": "function", "function": {"name": "boil"}}]
    row = {"instruction": "Translate.", "input": "Tee", "history": [["Hi", "Hello"]], "tools": tools}
    pair = read_pair({**row, "chosen": "Tea", "rejected": "Tree"}, "")
    for half, answer in (pair.chosen, "Tea"), (pair.rejected, "Tree"):
        assert half.tools == tools
        assert [message["content"] for message in half.messages] == ["Hi", "Hello", "Translate.\nTee", answer]
        assert [message.get("train", True) for message in half.messages] == [True, False, True, True]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "identical answers"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "identical answers"),
        ({"chosen": [USER, GOOD], "rejected": [turn("user", "What is tee?"), BAD]}, "different prompts"),
        ({"chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]}, "different prompts"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, GOOD]}, "different prompts"),
        ({"messages": [USER, GOOD], "chosen": "a", "rejected": "b"}, "different prompts"),
        ({"prompt": [USER, GOOD], "chosen": [BAD], "rejected": [turn("assistant", "b")]}, "different prompts"),
        ({"chosen": "a", "rejected": "b"}, "missing column"),
        ({"prompt": "q", "chosen": "a"}, "missing column"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "empty content"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "empty content"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "empty content"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "wrong type"),
        ({"prompt": "q", "question": "r", "chosen": "a", "rejected": "b"}, "conflicting values"),
        ({"system": "x", "chosen": [SYSTEM, USER, GOOD], "rejected": [USER, BAD]}, "conflicting system messages"),
        ({"chosen": [USER, {**GOOD, "train": False}], "rejected": [USER, BAD]}, "no assistant turn"),
        ({"chosen": [USER], "rejected": [USER, BAD]}, "no assistant turn"),
        ({"chosen": [USER, GOOD, turn("user", "And?")], "rejected": [USER, BAD]}, "no assistant turn"),
    ],
)
def test_rows_that_are_no_pair_are_refused(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(RowError) as refused:
        read_pair(row, "")
    assert refused.value.kind == kind


def test_columns_that_are_not_read_are_collected_and_repeated_prompts_are_not() -> None:
    row = {**SAME_PAIR["ultrafeedback_binarized"], "rationale": "It is shorter than the other."}
    unread: dict[str, list[Any]] = {}
    read_pair(row, "", unread=unread)
    assert unread.keys() == {"messages", "score_chosen", "rationale"}
    unread = {}
    halves = {half: [USER, {**answer, "note": half}] for half, answer in (("chosen", GOOD), ("rejected", BAD))}
    assert read_pair(halves, "", ignore=["chosen[].note"], unread=unread).chosen.messages == [USER, GOOD]
    assert unread == {"chosen[].note": ["chosen"], "rejected[].note": ["rejected"]}


def test_pairs_are_no_format_of_single_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="section `preference`"):
        detect(["prompt", "chosen", "rejected"])
    assert detect(["messages", "chosen", "rejected"]) == "messages"
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(SAME_PAIR["texts"]) + "\n")
    ((_, row),) = read_rows(Source(path=str(path)))
    assert read_pair(row, "").chosen.messages == [SYSTEM, USER, GOOD]
