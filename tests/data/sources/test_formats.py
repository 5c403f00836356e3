"""Formats: rows of every format become the expected messages; the error of a bad row says what is wrong."""

import json
from typing import Any

import pytest
from external_data import FOLDER

from train.data.sources.formats import ROLES, ROW_ERROR_KINDS, RowError, convert, detect
from train.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief. 𝕊𝕪𝕤 🜲"}
USER = {"role": "user", "content": "Why is the sky blue? 空"}
ASSISTANT = {"role": "assistant", "content": "Air scatters\nblue light most. 🌌"}
TURNS = [SYSTEM, USER, ASSISTANT]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Seoul", "unit": None}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

SAME_THREE_TURNS: dict[str, tuple[str, dict[str, Any]]] = {
    "messages": ("messages", {"messages": TURNS, "id": 7}),
    "messages as JSON": ("messages", {"messages": json.dumps(TURNS)}),
    "messages as Arrow gives them": (
        "messages",
        {"messages": [{**turn, "tool_calls": None, "name": None, "train": None} for turn in TURNS], "tools": None},
    ),
    "messages of parts": (
        "messages",
        {
            "messages": [
                SYSTEM,
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Why is "}, {"type": "text", "text": "the sky blue? 空"}],
                },
                ASSISTANT,
            ]
        },
    ),
    "messages with a system column": ("messages", {"messages": TURNS[1:], "system": SYSTEM["content"]}),
    "messages with the same system twice": ("messages", {"messages": TURNS, "system_prompt": SYSTEM["content"]}),
    "messages beside a prompt": ("messages", {"prompt": "Something else", "messages": TURNS}),
    "sharegpt": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": SYSTEM["content"]},
                {"from": "human", "value": USER["content"]},
                {"from": "gpt", "value": ASSISTANT["content"]},
            ]
        },
    ),
    "sharegpt with a system column": (
        "sharegpt",
        {
            "system": SYSTEM["content"],
            "conversations": [
                {"from": "user", "value": USER["content"]},
                {"from": "bard", "value": ASSISTANT["content"]},
            ],
        },
    ),
    "sharegpt with role and content": ("sharegpt", {"conversations": TURNS}),
    "alpaca": (
        "alpaca",
        {"system": SYSTEM["content"], "instruction": USER["content"], "input": "", "output": ASSISTANT["content"]},
    ),
    "question and answer": (
        "question_answer",
        {"system": SYSTEM["content"], "question": USER["content"], "answer": ASSISTANT["content"], "type": "x"},
    ),
    "query and response": (
        "question_answer",
        {
            "system": SYSTEM["content"],
            "original_question": "?",
            "query": USER["content"],
            "response": ASSISTANT["content"],
        },
    ),
    "instruction and response": (
        "question_answer",
        {"system": SYSTEM["content"], "instruction": USER["content"], "response": ASSISTANT["content"]},
    ),
    "exchanges": (
        "exchanges",
        {
            "source": "x",
            "system": SYSTEM["content"],
            "conversation": [{"input": USER["content"], "output": ASSISTANT["content"]}],
        },
    ),
    "exchanges as JSON": (
        "exchanges",
        {
            "system": SYSTEM["content"],
            "conversation": json.dumps([{"input": USER["content"], "output": ASSISTANT["content"]}]),
        },
    ),
    "janus": (
        "janus",
        {
            "main_source": "x",
            "original_source": "y",
            "preference_set": [{"dimension": "style", "preference": "short"}],
            "system": SYSTEM["content"],
            "prompt": USER["content"],
            "output": ASSISTANT["content"],
        },
    ),
    "janus, older": (
        "janus",
        {"id": 3, "system_prompt": SYSTEM["content"], "user_prompt": USER["content"], "output": ASSISTANT["content"]},
    ),
    "janus, oldest": (
        "janus",
        {"system": SYSTEM["content"], "instruction": USER["content"], "output": ASSISTANT["content"]},
    ),
    "prompt and completion": (
        "prompt_completion",
        {"system": SYSTEM["content"], "prompt": USER["content"], "completion": ASSISTANT["content"]},
    ),
    "prompt and completion as turns": ("prompt_completion", {"prompt": TURNS[:2], "completion": TURNS[2:]}),
    "prompt and completion as JSON": (
        "prompt_completion",
        {"prompt": json.dumps(TURNS[:2]), "completion": json.dumps(TURNS[2:])},
    ),
}


@pytest.mark.parametrize("name", SAME_THREE_TURNS)
def test_every_format_gives_the_same_messages(name: str) -> None:
    format, row = SAME_THREE_TURNS[name]
    before = json.dumps(row)
    assert detect(row) == format
    assert convert(row, format) == (TURNS, None)
    assert json.dumps(row) == before  # the row itself is left as it was


def test_older_janus_columns_read_as_alpaca_mean_the_same() -> None:
    row = SAME_THREE_TURNS["janus, oldest"][1]
    assert convert(row, "alpaca") == convert(row, "janus")


def test_a_published_row_of_multifaceted_collection() -> None:
    path = FOLDER / "janus" / "collection_row_old_schema.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    row = json.loads(path.read_text(encoding="utf-8"))
    messages, _ = convert(row, detect(row))
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]
    assert [message["content"] for message in messages] == [row["system"], row["instruction"], row["output"]]


@pytest.mark.parametrize("file", ["glaive_tools", "tau_airline_tools"])
def test_real_tool_calls_keep_their_words_and_arguments(file: str) -> None:
    path = FOLDER / "conversations" / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {path}")
    calls = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages, tools = convert(row, detect(row))
        assert [turn["content"] for turn in messages] == [turn["content"] for turn in row["messages"]]
        given = [call["function"] for turn in row["messages"] for call in turn.get("tool_calls") or ()]
        assert [call["function"] for turn in messages for call in turn.get("tool_calls", ())] == given
        assert [tool["function"]["name"] for tool in tools or ()] == [tool["name"] for tool in row.get("tools", ())]
        calls += len(given)
    assert calls > 100


def test_alpaca_joins_input_and_puts_history_first() -> None:
    row = {"instruction": "Translate:", "input": "Guten Tag", "output": "Good day", "history": [["Hi", "Hello"]]}
    assert detect(row) == "alpaca"
    assert [(turn["role"], turn["content"]) for turn in convert(row, "alpaca")[0]] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Translate:\nGuten Tag"),
        ("assistant", "Good day"),
    ]
    row = {"instruction": "", "input": "Guten Tag", "output": "Good day"}
    assert convert(row, "alpaca")[0][0]["content"] == "Guten Tag"


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize("name", ["messages of parts", "alpaca", "prompt and completion"])
def test_a_system_column_is_never_lost(column: str, name: str) -> None:
    format, row = SAME_THREE_TURNS[name]
    row = {key: value for key, value in row.items() if key != "system"} | {column: "Rhyme."}
    if format == "messages":
        row["messages"] = row["messages"][1:]
    messages, _ = convert(row, detect(row))
    assert messages == [{"role": "system", "content": "Rhyme."}, *TURNS[1:]]


def test_system_messages_that_are_empty_are_left_out_and_others_stay_where_they_are() -> None:
    late = {"role": "system", "content": "Now rhyme."}
    turns = [{"role": "system", "content": " \n"}, SYSTEM, late, USER, ASSISTANT, late, USER, ASSISTANT]
    assert convert({"messages": turns, "system": ""}, "messages")[0] == turns[1:]
    assert convert({"system": "", "prompt": "a", "output": "b"}, "janus")[0][0]["role"] == "user"


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_an_empty_input_column_changes_nothing(nothing: str | None) -> None:
    row = {"system": "s", "prompt": "p", "input": nothing, "output": "o"}
    assert [turn["content"] for turn in convert(row, "janus")[0]] == ["s", "p", "o"]


def test_text_is_not_trimmed() -> None:
    row = {"system": " s\n", "prompt": "\n p", "completion": " c "}
    assert [turn["content"] for turn in convert(row, "prompt_completion")[0]] == [" s\n", "\n p", " c "]


TOOL_TURNS = {
    "an object": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    "arguments as JSON": {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Seoul", "unit": null}'}}
        ],
    },
    "flat": {"role": "assistant", "content": "", "tool_calls": [CALL["function"]]},
    "all as JSON": {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
    "OpenAI's older name": {"role": "assistant", "content": None, "function_call": CALL["function"]},
    "ShareGPT's turn": {"from": "function_call", "value": json.dumps(CALL["function"])},
}


@pytest.mark.parametrize("form", TOOL_TURNS)
def test_tool_calls_come_out_in_one_form(form: str) -> None:
    result = {"from": "observation", "value": ""}
    row = {"messages": [USER, TOOL_TURNS[form], result, ASSISTANT], "tools": json.dumps([TOOL["function"]])}
    messages, tools = convert(row, "messages")
    assert messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert messages[2] == {"role": "tool", "content": ""}
    assert tools == [TOOL]


def test_message_keys_with_a_meaning_are_kept() -> None:
    call = {"id": "c1", **CALL}
    turns = [
        {"role": "developer", "content": "x", "weight": None, "extra": 1},
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "train": False, "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0},
        {"role": "function", "content": "d", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "e", "weight": 1},
        {"role": "user", "content": "a question without an answer"},
    ]
    assert convert({"messages": turns}, "messages")[0] == [
        {"role": "system", "content": "x"},
        {"role": "user", "content": "a", "name": "Ann"},
        {"role": "assistant", "content": "b", "train": False, "reasoning_content": "hm"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "", "tool_calls": [call], "train": False},
        {"role": "tool", "content": "d", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "e", "train": True},
        {"role": "user", "content": "a question without an answer"},
    ]


def test_answers_within_a_prompt_are_context() -> None:
    row = {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}
    assert [turn.get("train") for turn in convert(row, "prompt_completion")[0]] == [None, False, None, None]


def test_a_prompt_of_prose_may_look_like_a_list() -> None:
    row = {"prompt": '[{"a": 1}] What is this?', "completion": "A list."}
    assert convert(row, "prompt_completion")[0][0] == {"role": "user", "content": row["prompt"]}


def test_every_role_name_is_one_of_four() -> None:
    assert set(ROLES.values()) == {"system", "user", "assistant", "tool"}
    for name in (
        "human",
        "gpt",
        "system",
        "user",
        "assistant",
        "tool",
        "function_call",
        "observation",
        "chatgpt",
        "bing",
    ):
        assert name in ROLES


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


BAD_ROWS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "no turns": ("messages", {"messages": []}, "no assistant turn", "none"),
    "no answer": ("messages", turns(("system", "s"), ("user", "u")), "no assistant turn", "system, user"),
    "nothing trained": (
        "messages",
        {"messages": [USER, {**ASSISTANT, "train": False}]},
        "no assistant turn",
        "has a loss switch",
    ),
    "misspelt role": (
        "messages",
        turns(("usr", "u"), ("assistant", "a")),
        "unknown role",
        'message 1 has the role the text "usr"',
    ),
    "no role": ("messages", {"messages": [USER, {"content": "a"}]}, "unknown role", "message 2 has the role nothing"),
    "role of a wrong type": ("messages", turns((["user"], "u")), "unknown role", "message 1"),
    "blank question": ("messages", turns(("user", " \n"), ("assistant", "a")), "empty content", "message 1 (user)"),
    "empty answer": ("messages", turns(("user", "u"), ("assistant", "")), "empty content", "message 2 (assistant)"),
    "null answer": ("messages", turns(("user", "u"), ("assistant", None)), "empty content", "message 2 (assistant)"),
    "null column": ("janus", {"prompt": "p", "output": None}, "empty content", "`output` is null"),
    "a number": ("messages", turns(("user", 3), ("assistant", "a")), "wrong type", "message 1 is the number 3"),
    "an object": ("messages", {"messages": {"role": "user"}}, "wrong type", "a list of messages"),
    "messages of texts": ("messages", {"messages": ["hi", "ho"]}, "wrong type", 'message 1 is the text "hi"'),
    "an image": (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, ASSISTANT]},
        "unsupported content",
        'message 1 has a part the text "image_url"',
    ),
    "messages of broken JSON": ("messages", {"messages": '[{"role": "user",]'}, "invalid JSON", "`messages`"),
    "a missing column": ("janus", {"prompt": "p"}, "missing column", "no `output` among the columns `prompt`"),
    "output a list": ("alpaca", {"instruction": "i", "output": ["a"]}, "wrong type", '`output` is the list ["a"]'),
    "an answer that is null": (
        "question_answer",
        {"question": "q", "answer": None},
        "empty content",
        "`answer` is null",
    ),
    "an exchange that is a text": (
        "exchanges",
        {"conversation": ["hi"]},
        "wrong type",
        '`conversation` holds the text "hi"',
    ),
    "an exchange without output": ("exchanges", {"conversation": [{"input": "q"}]}, "missing column", "no `output`"),
    "a system of numbers": (
        "janus",
        {"system": 1, "prompt": "p", "output": "o"},
        "wrong type",
        "`system` is the number 1",
    ),
    "an input beside Janus's columns": (
        "janus",
        {"system": "s", "instruction": "Translate.", "input": "Guten Tag", "output": "Good day"},
        "input not read",
        '`input` is the text "Guten Tag": write `format: alpaca`',
    ),
    "two systems": ("messages", {"messages": TURNS, "system": "Be long."}, "conflicting system messages", "Be long."),
    "two columns": (
        "janus",
        {"system": "a", "system_prompt": "b", "prompt": "p", "output": "o"},
        "conflicting system messages",
        '"b"',
    ),
    "broken tools": ("messages", {"messages": TURNS, "tools": "[{]"}, "invalid JSON", "`tools`"),
    "tools of texts": ("messages", {"messages": TURNS, "tools": ["weather"]}, "wrong type", "`tools`"),
    "broken arguments": (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": "{city}"}]}]},
        "invalid JSON",
        "the arguments of weather in message 2",
    ),
    "calls by a user": (
        "messages",
        {"messages": [{**USER, "tool_calls": [CALL]}, ASSISTANT]},
        "wrong type",
        "message 1 (user)",
    ),
    "a function call of prose": (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "call it"}]},
        "invalid JSON",
        "message 1",
    ),
    "half a character": (
        "messages",
        turns(("user", "a\ud83d"), ("assistant", "a")),
        "not UTF-8",
        "\\ud83d, at character 2",
    ),
    "half a character in a tool": (
        "messages",
        {"messages": TURNS, "tools": [{"name": "a\ud83d"}]},
        "not UTF-8",
        "`tools`",
    ),
    "train of a wrong type": ("messages", {"messages": [USER, {**ASSISTANT, "train": "no"}]}, "wrong type", "`train`"),
    "a negative weight": ("messages", {"messages": [USER, {**ASSISTANT, "weight": -0.5}]}, "wrong type", "`weight`"),
    "history of texts": (
        "alpaca",
        {"instruction": "i", "output": "o", "history": ["a"]},
        "wrong type",
        "`history` item 1",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_says_what_is_wrong(name: str) -> None:
    format, row, kind, words = BAD_ROWS[name]
    with pytest.raises(RowError) as caught:
        convert(row, format)
    assert caught.value.kind == kind
    assert kind in ROW_ERROR_KINDS
    assert words in caught.value.detail
    caught.value.detail.encode()  # it can be printed, whatever the row held


def test_columns_of_an_unknown_format_are_named() -> None:
    with pytest.raises(UserError) as caught:
        detect(["prompt", "chosen", "rejected"])
    assert "`prompt`, `chosen`, `rejected`" in str(caught.value)
    for name in ("messages", "sharegpt", "alpaca", "janus", "prompt_completion", "question_answer", "exchanges"):
        assert name in str(caught.value)


def test_a_conversation_may_hold_turns_in_place_of_exchanges() -> None:
    turns = [{"role": "user", "content": "u", "language": "English"}, {"role": "assistant", "content": "a"}]
    row = {"conversation": turns, "model": "m"}
    assert detect(row) == "exchanges"
    messages, tools = convert(row, "exchanges")
    assert (messages, tools) == ([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], None)
    exchange = {"conversation": [{"input": "u", "output": "a", "role": "r"}]}
    assert convert(exchange, "exchanges")[0] == messages


def test_roles_of_other_tools_are_known() -> None:
    row = {
        "messages": [
            {"role": "User", "content": "u"},
            {"role": "tool_call", "content": '{"name": "f", "arguments": {"x": 1}}'},
            {"role": "tool_response", "content": "r"},
            {"role": "Assistant", "content": "a"},
        ]
    }
    messages, _ = convert(row, "messages")
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert convert(
        {"messages": [{"role": "prompter", "content": "u"}, {"role": "assistant", "content": "a"}]}, "messages"
    )


def test_alpaca_with_its_rendered_prompt_is_alpaca() -> None:
    assert detect(["instruction", "input", "output", "prompt"]) == "alpaca"
