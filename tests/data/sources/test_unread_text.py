"""Unread text: every text of a row is read, reported, or a row error; unread content stops the run."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data.chat.template import use_template
from train.data.diagnostics import describe_unread, find_data_error, find_data_warnings
from train.data.prepare import examine
from train.data.prepared_data import PreparedData
from train.data.sources.formats import ROLES, RowError, convert, detect, read_row
from train.data.sources.readers import ParsedRows
from train.data.sources.source import read_conversations
from train.data.sources.unread_text import find_lost_text, is_metadata, is_prose
from train.data.tokens.table import RowIssues
from train.data.tokens.workers import RowTokenizer
from train.model.tokenizer import load_tokenizer
from train.recipe import ModelSection, Source, load_recipe
from train.sft import main

TEMPLATE = (
    "{% if custom_instructions %}<|im_start|>system\n{{ custom_instructions }}<|im_end|>\n{% endif %}"
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function.name }} {{ c.function.arguments | tojson }}\n"
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML with tools and reasoning. It leaves out names and ids."""

USER, ASSISTANT = {"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Say."}


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> RowTokenizer:
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_model)))
    tokenizer.chat_template = TEMPLATE
    return RowTokenizer(tokenizer, "assistant")


def encoded(rows: RowTokenizer, row: dict[str, Any], format: str = "auto") -> tuple[str, RowIssues]:
    """Return the trained text of a row (of all its rows), and its issues."""
    batch, errors = rows.encode_chunk(0, ParsedRows([(":1", row)]), detect(row) if format == "auto" else format)
    backend = rows.encoder._backend
    return "\n".join(backend.decode(ids, skip_special_tokens=False) for ids in batch["input_ids"].to_pylist()), errors


def read_texts(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in convert(row, detect(row))[0]]


# -- names that are read


@pytest.mark.parametrize("question", ["instruction", "question", "query"])
@pytest.mark.parametrize("context", ["input", "context"])
@pytest.mark.parametrize("answer", ["response", "answer"])
def test_a_context_follows_the_question(question: str, context: str, answer: str) -> None:
    row = {question: "When?", context: "In 1931 it opened.", answer: "In 1931."}
    assert read_texts(row) == [("user", "When?\nIn 1931 it opened."), ("assistant", "In 1931.")]
    assert read_texts(row | {context: ""}) == [("user", "When?"), ("assistant", "In 1931.")]
    assert read_texts(row | {question: " "}) == [("user", "In 1931 it opened."), ("assistant", "In 1931.")]


def test_alpaca_takes_a_context_and_every_single_question_a_history() -> None:
    row = {"system": "s", "instruction": "When?", "context": "In 1931.", "output": "1931"}
    assert read_texts(row) == [("system", "s"), ("user", "When?\nIn 1931."), ("assistant", "1931")]
    for row in (
        {"query": "So?", "response": "So.", "history": [["Hi", "Ho"]]},  # ms-swift
        {"prompt": "So?", "output": "So.", "history": '[["Hi", "Ho"]]'},
    ):
        assert read_texts(row) == [("user", "Hi"), ("assistant", "Ho"), ("user", "So?"), ("assistant", "So.")]


@pytest.mark.parametrize(
    "column", ["system", "system_prompt", "system_message", "system_instruction", "system_content"]
)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Ask."}, {"from": "gpt", "value": "Say."}]},
        {"question": "Ask.", "answer": "Say."},
        {"conversation": [{"input": "Ask.", "output": "Say."}]},
    ],
    ids=detect,
)
def test_a_system_message_may_have_any_of_these_names(column: str, row: dict[str, Any]) -> None:
    assert read_texts({**row, column: "Rhyme."}) == [("system", "Rhyme."), ("user", "Ask."), ("assistant", "Say.")]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_trained_under_any_of_its_names(rows: RowTokenizer, key: str) -> None:
    text, errors = encoded(rows, {"messages": [USER, {**ASSISTANT, key: "Let me see."}]})
    assert "<think>\nLet me see.\n</think>" in text
    assert not errors.unread


@pytest.mark.parametrize(
    ("key", "no", "yes"),
    [
        ("train", False, True),
        ("training", False, True),
        ("trainable", False, True),
        ("loss", False, True),
        ("loss", 0, 1),
        ("weight", 0.0, 1.0),
        ("loss_weight", 0.0, 1.0),
        ("loss_scale", 0.0, 1.0),
        ("masked", True, False),
    ],
)
def test_a_loss_switch_may_have_any_of_these_names(key: str, no: Any, yes: Any) -> None:
    turns = [USER, {**ASSISTANT, key: no}, USER, {**ASSISTANT, key: yes}, USER, {**ASSISTANT, key: None}]
    messages, _ = convert({"messages": turns}, "messages")
    assert [turn.get("train") for turn in messages if turn["role"] == "assistant"] == [False, True, None]
    assert convert({"messages": [{**USER, key: no}, ASSISTANT]}, "messages")[0][0]["train"] is False  # as it is anyway


@pytest.mark.parametrize("column", ["tools", "functions", "available_tools", "chat_template_kwargs"])
def test_tools_may_have_any_of_these_names(column: str) -> None:
    flat = {"name": "weather", "description": "Tell it.", "parameters": {"type": "object"}}
    row: dict[str, Any] = {"messages": [USER, ASSISTANT]}
    row[column] = {"tools": [flat]} if column == "chat_template_kwargs" else json.dumps([flat])
    assert convert(row, "messages")[1] == [{"type": "function", "function": flat}]
    if column == "chat_template_kwargs":
        assert convert({**row, column: json.dumps(row[column])}, "messages")[1] is not None


def test_arguments_of_a_call_may_be_called_parameters(rows: RowTokenizer) -> None:
    call = {"name": "weather", "parameters": {"city": "Seoul"}}  # as Llama 3.1 writes it
    text, _ = encoded(rows, {"messages": [USER, {"role": "assistant", "tool_calls": [call]}]})
    assert '"Seoul"' in text


def test_parts_of_a_content_may_have_their_text_as_value() -> None:
    turn = {"role": "user", "content": [{"type": "text", "value": "Ask "}, {"type": "text", "text": "me."}]}
    assert read_texts({"messages": [turn, ASSISTANT]})[0] == ("user", "Ask me.")


# -- two names of one thing, and what can't be meant


CALL = {"name": "f", "arguments": {}}
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "input and context": ({"instruction": "i", "input": "a", "context": "b", "response": "r"}, "conflicting values", "b"),
    "question and query": ({"question": "q", "query": "p", "answer": "a"}, "conflicting values", "`query`"),
    "answer and response": ({"question": "q", "answer": "a", "response": "b"}, "conflicting values", "`response`"),
    "prompt and instruction": ({"prompt": "p", "instruction": "i", "output": "o"}, "conflicting values", "`prompt`"),
    "two systems": ({"system": "a", "system_message": "b", "question": "q", "answer": "a"}, "conflicting system messages", "b"),
    "context beside Janus's columns": ({"prompt": "p", "context": "c", "output": "o"}, "input not read", "rename `prompt`"),
    "content and value": ({"messages": [{**USER, "value": "Else."}, ASSISTANT]}, "conflicting values", "Else."),
    "role and from": ({"messages": [{**USER, "from": "gpt"}, ASSISTANT]}, "conflicting values", "`from`"),
    "thinking and reasoning": ({"messages": [USER, {**ASSISTANT, "thinking": "a", "reasoning": "b"}]}, "conflicting values", "`reasoning`"),
    "two kinds of calls": ({"messages": [USER, {**ASSISTANT, "tool_calls": [CALL], "function_call": {"name": "g"}}]}, "conflicting values", "`function_call`"),
    "two kinds of tools": ({"messages": [USER, ASSISTANT], "tools": [CALL], "functions": [{"name": "g"}]}, "conflicting values", "`functions`"),
    "two switches": ({"messages": [USER, {**ASSISTANT, "loss": True, "weight": 0}]}, "conflicting values", "contradict"),
    "part of a message": ({"messages": [USER, {**ASSISTANT, "train_detail": [{"begin_offset": 0, "end_offset": 1, "train": True}]}]}, "unsupported loss switch", "`train_detail`"),
    "half a switch": ({"messages": [USER, {**ASSISTANT, "trainable": 0.5}]}, "wrong type", "`trainable`"),
    "loss by turns": ({"messages": [USER, {**ASSISTANT, "loss_scale": [1, 0]}]}, "wrong type", "`loss_scale`"),
    "a trained user": ({"messages": [{**USER, "training": True}, ASSISTANT]}, "unsupported loss switch", "message 1 (user)"),
    "an unmasked user": ({"messages": [{**USER, "masked": False}, ASSISTANT]}, "unsupported loss switch", "`masked`"),
    "reasoning of a user": ({"messages": [{**USER, "thinking": "Hm."}, ASSISTANT]}, "wrong type", "`thinking`"),
    "NaN in a call": ({"messages": [USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}]}, "wrong type", "tool calls of message 2: JSON has no NaN"),
    "infinity in a tool": ({"messages": [USER, ASSISTANT], "tools": [{**CALL, "maximum": float("inf")}]}, "wrong type", "`tools`: JSON has no NaN"),
    "kwargs of text": ({"messages": [USER, ASSISTANT], "chat_template_kwargs": '"x"'}, "wrong type", "`chat_template_kwargs`"),
    "kwargs that are ours": ({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"chat_template": "x"}}, "wrong type", "chat_template,"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_an_ambiguous_row_is_a_row_error(name: str) -> None:
    row, kind, words = FAULTS[name]
    with pytest.raises(RowError) as caught:
        read_row(row, detect(row), ":1")
    assert caught.value.kind == kind
    assert words in caught.value.detail


def test_equal_values_under_two_names_are_not_an_error() -> None:
    row = {
        "question": "q", "query": "q", "answer": "a", "response": "a\n", "input": "", "context": "c",
        "system": "s", "system_prompt": "s",
    }  # fmt: skip
    assert read_texts(row) == [("system", "s"), ("user", "q\nc"), ("assistant", "a")]
    turn = {"role": "user", "from": "human", "content": "u", "value": "u"}
    assert read_texts({"messages": [turn, {**ASSISTANT, "thinking": "t", "reasoning": "t"}]})[0] == ("user", "u")


# -- what is content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("source", "Open-Orca/FLAN with a prompt"), ("id", "flan.2382"), ("prompt_id", "a" * 80),
        ("category", "closed question answering"), ("original_source", "a set of words"), ("avatarUrl", "a b c d"),
        ("openai_moderation", [{"categories": "many words in here"}]), ("header", {"user-agent": "Mozilla of some kind"}),
        ("preference_set", [{"dimension": "style", "description": "The user likes it to be short."}]),
        ("model_name", "a model of ours"), ("sysgen", {"annotated": "<<Role>>You are a cook<</Role>>"}),
        ("original_question", "What was asked at first?"), ("conversation_hash", "0" * 64),
        ("anything", 3.5), ("anything", {"a": 1, "b": [True, None]}), ("anything", object()), ("short", "Paris"),
        ("reasoning", "off"), ("loss", 1.25), ("system_prompt_id", "one of three words"), ("train_tokens", [12, 0, 1, 7]),
        ("link_to", "https://example.org/" + "a/" * 60), ("digest_of", "0f" * 64), ("when", "2024-05-01 10:00:00"),
    ],
)  # fmt: skip
def test_metadata_is_not_content(name: str, value: Any) -> None:
    assert find_lost_text(name, [value], ["The conversation."]) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rationale", "It opened in 1931."), ("messages[].note", "Write in capitals."), ("hint", "x" * 65),
        ("guidance", "請用大寫字母回答。"), ("guidance", "すべて大文字で書いてください"), ("chosen", [{"role": "assistant", "content": "No."}]),
        ("rejected", "No"), ("input", "42"), ("anything", {"a": [{"b": "Three words here"}]}), ("text", "Some other text."),
        ("documents", [{"title": "T", "text": "The bridge opened late."}]), ("title", "How do I open it?"),
        ("system_role", "You are a pirate."), ("role", "You are a pirate."), ("promptHeader", "Answer in French only."),
        ("instructionType", "Answer in French only."), ("profile", {"role": "You are a pirate."}), ("note", "英語で答えて"),
        ("messages[].mask", False), ("messages[].do_train", True), ("loss_mask", [0, 1]), ("is_trainable", 0),
        ("messages[].calculate_loss", True), ("supervised", False),
    ],
)  # fmt: skip
def test_content_is_distinguished_from_ids(name: str, value: Any) -> None:
    assert find_lost_text(name, [value], ["The conversation."]) is not None


def test_a_text_that_is_in_the_conversation_is_not_lost() -> None:
    texts = ["Be brief and kind.", "Translate into Spanish.\nI have 2 cats.", "Tengo 2 gatos."]
    assert find_lost_text("prompt", ["Translate into Spanish.\nI have 2 cats. "], texts) is None  # ultrachat_200k
    complete = (
        "Be brief and kind. ### Instruction: Translate into Spanish. ### Input: I have 2 cats. ### Tengo 2 gatos."
    )
    assert find_lost_text("text", [complete], texts) is None  # Alpaca
    assert find_lost_text("text", [complete.replace("2 gatos", "3")], texts) is not None
    assert find_lost_text("text", [f"{complete}\n### System: Answer like a pirate."], texts) is not None
    preamble = "Below is an instruction that describes a task. Write a response that completes the request."
    assert find_lost_text("text", [f"{preamble}\n\n{complete}"], texts) is None  # as Alpaca renders it
    sum_of_two = ["What is 2+2?", "4"]
    assert find_lost_text("rationale", ["What is 2+2? Two fingers and two fingers are 4."], sum_of_two) is not None
    assert is_prose("Answer in capitals")
    assert not is_prose("Answer quickly")
    assert not is_metadata("messages[].content")


# -- what is told of a source


def test_unread_values_are_counted_by_name(rows: RowTokenizer) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "Ask.", "cache_control": {"type": "ephemeral"}}], "mood": "calm"},
        {**ASSISTANT, "note": "One of several notes.", "name": "Ann"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", "name": "f", "arguments": {"a": "b"}}]},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
    ]  # fmt: skip
    _, errors = encoded(rows, {"messages": turns, "id": 3, "nothing": None, "blank": " ", "why": "As it is so."})
    assert errors.errors == {}
    assert errors.unread == {
        "id": (1, 0, None),
        "why": (1, 1, (0, ":1", "As it is so.")),
        "messages[].mood": (1, 0, None),
        "messages[].note": (1, 1, (0, ":1", "One of several notes.")),
        "messages[].name": (1, 0, None),
        "messages[].content[].cache_control": (1, 0, None),
        "messages[].tool_call_id": (1, 0, None),
        "messages[].tool_calls[].id": (1, 0, None),
    }


def test_unread_names_and_texts_can_always_be_written_as_utf8(rows: RowTokenizer) -> None:
    row = {"messages": [USER, ASSISTANT], 0: "A column that a data frame had.", "half\ud83d": "Half of a \ud83d pair."}
    _, errors = encoded(rows, row)
    assert set(errors.unread) == {"0", "half\\ud83d"}
    json.dumps(errors.unread, ensure_ascii=False).encode()


def test_variables_of_a_row_go_to_the_template(rows: RowTokenizer) -> None:
    row = {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"custom_instructions": "Write in capitals."}}
    text, errors = encoded(rows, row)
    assert "system\nWrite in capitals." in text
    assert errors.unread == {}
    text, errors = encoded(
        rows, row | {"chat_template_kwargs": {"persona": "Zorro", "enable_thinking": False, "x": []}}
    )
    assert set(errors.unread) == {"chat_template_kwargs.persona", "chat_template_kwargs.enable_thinking"}
    typed = row | {"chat_template_kwargs": {"custom_instructions": "<|im_end|>"}}
    assert "control token" in str(list(encoded(rows, typed)[1].errors))


def test_a_check_refuses_content_that_is_not_read_and_says_what_to_write(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    lines = [
        {"messages": [USER, {**ASSISTANT, "note": f"A note of row {row}."}], "why": "As it is so.", "source": "a b c"}
        for row in range(6)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    recipe = recipe_file(data={"sources": [{"path": str(file)}]})
    assert main(["--recipe", str(recipe), "--check", "--json", str(report)]) == 2
    page, error = capsys.readouterr()
    assert error.startswith("error: data.sources.0: text that is not read")
    assert f'`why` in 6 rows, first {file}:1: "As it is so."' in error
    assert "data.sources.0.ignore: ['messages[].note', why]" in error
    page = " ".join(page.split())
    assert "why (6 rows, content in 6)" in page
    assert "source (6 rows)" in page
    reported = {text["name"]: text for text in json.loads(report.read_text())["unread"]}
    assert (reported["why"]["rows"], reported["why"]["losing"], reported["source"]["losing"]) == (6, 6, 0)

    def examined(*ignore: str) -> tuple[PreparedData, str | None]:
        loaded = load_recipe(recipe_file(data={"sources": [{"path": str(file), "ignore": list(ignore)}]}))
        tokenizer = load_tokenizer(loaded.model)
        use_template(tokenizer, loaded.chat.template)
        data = examine(loaded, tokenizer)
        return data, find_data_error(data, loaded)

    data, error = examined("why", "messages[].note")
    assert error is None
    assert "why (ignored, 6 rows)" in describe_unread(data.unread)[0]
    assert data.caches[0].hit  # what no format reads changes no token
    data, error = examined("why", "messages[].notes")
    assert "data.sources.0.ignore: no row of" in error
    assert "Did you mean messages[].note?" in error
    data, error = examined("why", "messages[].note", "images")  # of another shard, say, or empty in this one
    assert error is None
    assert find_data_warnings(data)[:1] == [f"data.sources.0.ignore: no row of {file} has a value under `images`"]


def test_an_ignored_name_is_read_as_if_it_were_missing(rows: RowTokenizer) -> None:
    row = {
        "conversations": [{"from": "human", "value": "Ask."}, {"from": "gpt", "value": "Say.", "thinking": "Hm."}],
        "system": "Rhyme.",
        "why": "As it is so.",
    }
    unread: dict[str, list[Any]] = {}
    ignore = ("system", "messages[].thinking", "why")
    conversation = read_row(row, "sharegpt", ":1", ignore=ignore, unread=unread)
    assert conversation.messages == [USER, ASSISTANT]
    assert unread == {"system": ["Rhyme."], "messages[].thinking": ["Hm."], "why": ["As it is so."]}


def test_rows_for_data_generation_lose_no_text_either(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"messages": [USER, ASSISTANT], "id": "x", "chat_template_kwargs": {"custom_instructions": "Rhyme."}}
    file.write_text(json.dumps(row) + "\n")
    ((_, error),) = read_conversations(Source(path=str(file)))
    assert isinstance(error, RowError)
    assert "`chat_template_kwargs.custom_instructions` holds" in error.detail
    ignore = ("chat_template_kwargs.custom_instructions",)
    ((_, read),) = read_conversations(Source(path=str(file), ignore=ignore))
    assert not isinstance(read, RowError)


# -- any row of any format

TREES = ["ash", "birch", "cedar", "elm", "fir", "松の木", "42"]
WORDS = st.lists(st.sampled_from(TREES), min_size=1, max_size=5).map(" ".join)
VALUES = st.recursive(
    WORDS | st.none() | st.booleans() | st.integers(0, 3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "text", "title"]), inner, max_size=2),
    max_leaves=4,
)  # fmt: skip
EXTRA_KEYS = """
    name tool_call_id reasoning_content thinking reasoning train weight loss masked note value from content mood
    tool_calls prefix id
"""
EXTRA_COLUMNS = """
    system system_prompt system_message system_instruction tools functions chat_template_kwargs history input context
    prompt instruction question query response answer text rationale source id chosen messages conversation
"""


def turns(role: str, content: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    def turn(who: str) -> st.SearchStrategy[dict[str, Any]]:
        extra = st.dictionaries(st.sampled_from(EXTRA_KEYS.split()), VALUES, max_size=1)
        return st.builds(lambda text, more: {role: who, content: text, **more}, WORDS, extra)

    names = ("user", "assistant") if role == "role" else ("human", "gpt")
    return st.tuples(*map(turn, names)).map(list)


FORMATS = {
    "messages": st.fixed_dictionaries({"messages": turns("role", "content")}),
    "sharegpt": st.fixed_dictionaries({"conversations": turns("from", "value")}),
    "prompt_completion": st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}),
    "janus": st.fixed_dictionaries({"system": WORDS, "prompt": WORDS, "output": WORDS}),
    "alpaca": st.fixed_dictionaries({"instruction": WORDS, "input": WORDS, "output": WORDS}),
    "question_answer": st.fixed_dictionaries({"question": WORDS, "answer": WORDS}),
    "exchanges": st.fixed_dictionaries(
        {"conversation": st.lists(st.fixed_dictionaries({"input": WORDS, "output": WORDS}, optional={"note": VALUES}), min_size=1, max_size=2)}
    ),
}  # fmt: skip
STRUCTURED = {
    "tools": [{"name": "elm", "description": "ash birch cedar", "parameters": {"type": "object"}}],
    "functions": [{"name": "elm", "description": "fir cedar elm"}],
    "chat_template_kwargs": {"custom_instructions": "cedar elm ash", "enable_thinking": True, "persona": "birch"},
    "history": [["ash", "cedar cedar"]],
    "chosen": [{"role": "assistant", "content": "fir"}],
}
ROWS = st.one_of(
    [
        st.tuples(
            st.just(format),
            st.builds(
                lambda extra, structured, base: {**extra, **{key: STRUCTURED[key] for key in structured}, **base},
                st.dictionaries(st.sampled_from(EXTRA_COLUMNS.split()), VALUES, max_size=2),
                st.sets(st.sampled_from(sorted(STRUCTURED)), max_size=2),
                base,
            ),
        )
        for format, base in FORMATS.items()
    ]
)


def texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield each text of a row with the name under which it would be reported: its column, or messages[].KEY."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts(item, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item, f"{name}[]")


def numbered(value: Any, numbers: Iterator[int]) -> Any:
    """Return the value with distinct texts, so that none is found in place of another."""
    if isinstance(value, str):
        number = next(numbers)
        return value if value in ROLES else " ".join(f"{word}{number}" for word in value.split())
    if isinstance(value, dict):
        return {key: numbered(item, numbers) for key, item in value.items()}
    return [numbered(item, numbers) for item in value] if isinstance(value, list) else value


@settings(max_examples=200, deadline=None)
@given(ROWS)
def test_each_text_of_a_row_is_rendered_or_reported_or_the_row_is_refused(
    rows: RowTokenizer, generated: tuple[str, Any]
) -> None:
    format, row = generated
    row = numbered(row, count(1))
    rendered, errors = encoded(rows, row, format)
    if errors.errors:
        return
    reported = [name.replace("conversations[]", "messages[]") for name in errors.unread]
    for path, text in texts(row, ""):
        path = path.replace("conversations[]", "messages[]")
        if path.endswith((".role", ".from", ".type")):
            continue
        assert text in rendered or any(path.startswith(name) for name in reported), (path, text, rendered, reported)
