"""SysBench's file is read as it is; anything else is an error with its place."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sysbench_data import conversation, write_file

from train.errors import UserError
from train.evaluation.turns.sysbench_rows import Criterion, read_conversations


def test_every_field_of_the_published_form_is_read(tmp_path: Path) -> None:
    rows = [conversation(1), conversation(2, (1, 1, 1, 1, 3), system_id="two")]
    first, second = read_conversations(str(write_file(tmp_path / "data.json", rows)))
    assert (first.id, first.system, first.dependent) == (1, "System message 1.", True)
    assert (second.id, second.dependent) == ("two", False)
    assert [turn.user for turn in first.turns] == [f"Conversation 1, user turn {turn}." for turn in range(1, 6)]
    assert [turn.reference for turn in first.turns] == [f"Reference 1.{turn}." for turn in range(1, 6)]
    assert [turn.alignment for turn in first.turns] == ["align", "align", "misalign", "align", "misalign"]
    assert first.turns[2].criteria == (
        Criterion("Criterion 1.3.1 is met.", "style"),
        Criterion("Criterion 1.3.2 is met.", "format"),
    )
    assert [len(turn.criteria) for turn in second.turns] == [1, 1, 1, 1, 3]


def test_equal_user_turns_of_a_conversation_share_their_criteria(tmp_path: Path) -> None:
    row = conversation(1)
    row["messages"][3]["content"] = row["messages"][1]["content"]
    (read,) = read_conversations(str(write_file(tmp_path / "data.json", [row])))
    assert read.turns[1].criteria == read.turns[0].criteria
    assert read.turns[1].reference == "Reference 1.2."


def without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda row: row.pop(key)


def change(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(row: dict[str, Any]) -> None:
        *parents, last = path
        for key in parents:
            row = row[key]
        row[last] = to

    return apply


USER = "Conversation 2, user turn 1."


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("prompt_infos"), "there is no `prompt_infos`"),
        (without("rounds_related"), "there is no `rounds_related`"),
        (change("rounds_related", to="yes"), "`rounds_related` must be a valid boolean"),
        (change("system_id", to=1), "system_id 1 is that of conversation 1, too"),
        (change("system_id", to=None), "system_id"),
        (change("messages", 2, "role", to="user"), "`messages` has the roles system, user, user, user, assistant"),
        (change("messages", 2, "role", to="tool"), "`messages.2.role` must be 'system', 'user' or 'assistant'"),
        (change("messages", 2, "content", to=None), "`messages.2.content` must be a valid string"),
        (change("messages", to=[]), "`messages` has the roles of no message"),
        (change("messages", 1, "content", to="Other?"), "`prompt_infos` has no entry for user turn 1, 'Other?'"),
        (change("prompt_infos", USER, "alignment", to="unknown"), "must be 'align' or 'misalign' (found \"unknown\")"),
        (change("prompt_infos", USER, "criteria", to={}), f"`prompt_infos.{USER}.criteria`"),
        (change("prompt_infos", USER, "criteria", "1", to={}), f"`prompt_infos.{USER}.criteria.1.criteria_content`"),
    ],
)
def test_an_error_names_the_conversation_and_the_key(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    rows = [conversation(1), conversation(2)]
    damage(rows[1])
    file = write_file(tmp_path / "data.json", rows)
    with pytest.raises(UserError) as error:
        read_conversations(str(file))
    assert str(error.value).startswith(f"--sysbench {file}: conversation 2: ")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[\n{]", "data.json:2: not valid JSON: "),
        (b"{}", "data.json: holds no list of conversations. The file is a list of"),
        (b"[]", "data.json: holds no list of conversations"),
        (json.dumps([[]]).encode(), "data.json: conversation 1: found a list, not an object"),
        ("é".encode("latin-1"), "data.json: not UTF-8: "),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "data.json"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_conversations(str(file))
    assert message in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--sysbench .*nothing\.json: cannot be read"):
        read_conversations(str(tmp_path / "nothing.json"))
