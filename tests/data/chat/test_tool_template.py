"""The template chatml-tools: its text and trained spans, compared with plain string building and Qwen2.5's template."""

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from train.data.chat.assistant_spans import SpanFinder
from train.data.chat.template import TEMPLATES, render, use_template, without_generation_marks
from train.data.loss_mask import NOT_TRAINED, encode
from train.data.sources.formats import convert
from train.errors import UserError

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": 'The weather of a "city", wherever: 서울, <Oslo> & Bergen\'s.',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}}


def call(name: str, arguments: Any, number: int = 1) -> dict[str, Any]:
    return {"id": f"call{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def says(role: str, content: str, *calls: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **({"tool_calls": list(calls)} if calls else {}), **keys}


SYSTEM = says("system", "Answer in\nverse. ")
ASK = says("user", "Weather in 서울?")
OSLO, NOW = call("weather", {"city": "서울", "days": [1, 2.5, None, True]}), call("time", {}, 2)
ANSWER = says("assistant", " It rains.\n")
ROWS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "no tools": ([SYSTEM, ASK, ANSWER], None),
    "tools not called": ([SYSTEM, ASK, ANSWER, says("user", "Why?"), says("assistant", "Clouds.")], [WEATHER]),
    "a call": ([SYSTEM, ASK, says("assistant", "", OSLO), says("tool", "rain", tool_call_id="call1"), ANSWER], [WEATHER]),
    "a call with a text": ([SYSTEM, ASK, says("assistant", "Let me look.", OSLO), says("tool", "{}"), ANSWER], [WEATHER]),
    "calls side by side": (
        [SYSTEM, ASK, says("assistant", "", OSLO, NOW), says("tool", "rain"), says("tool", "noon\n"), ANSWER],
        [WEATHER, TIME],
    ),
    "one call after the other": (
        [SYSTEM, ASK, says("assistant", "", OSLO), says("tool", "rain"), says("assistant", "", NOW), says("tool", "noon"), ANSWER],
        [WEATHER, TIME],
    ),
    "a tool's turn at the end": ([SYSTEM, ASK, says("assistant", "Look:", NOW), says("tool", "noon"), says("tool", "rain")], [TIME]),
    "a question after a result": ([SYSTEM, ASK, says("assistant", "", NOW), says("tool", "noon"), says("user", "So?"), ANSWER], [TIME]),
    "a system message in the middle": ([SYSTEM, ASK, ANSWER, says("system", "Now in prose."), ASK, ANSWER], [TIME]),
    "calls without definitions": ([SYSTEM, ASK, says("assistant", "", NOW), says("tool", "noon"), ANSWER], None),
}  # fmt: skip


def written(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[str, list[str]]:
    """Return the text of a conversation and the texts that the model writes, built without a template."""
    text, trained = "", []
    if tools:
        system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        text = (
            f"<|im_start|>system\n{system}# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
            f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\n"
            "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
            'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        )
        messages = messages[1:] if system else messages
    results: list[str] = []
    for message, after in zip(messages, [*messages[1:], {"role": "end"}], strict=True):
        role, content = message["role"], message["content"]
        if role == "tool":
            results.append(f"<tool_response>\n{content}\n</tool_response>")
            if after["role"] == "tool":
                continue
            role, content, results = "user", "\n".join(results), []
        parts = [content] if content else []
        for call in message.get("tool_calls", []):
            function = call["function"]
            written_call = json.dumps(
                {"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False
            )
            parts.append(f"<tool_call>\n{written_call}\n</tool_call>")
        written_call = "\n".join(parts) + "<|im_end|>"
        trained += [written_call] if role == "assistant" else []
        text += f"<|im_start|>{role}\n{written_call}\n"
    return text, trained


@pytest.fixture(scope="module")
def tools_tokenizer(smollm2: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    use_template(tokenizer, "chatml-tools")
    return tokenizer


def check_row(tokenizer: Any, messages: Any, tools: Any, text: str, trained: list[str]) -> None:
    """Check that render and tokens are `text` and the trained texts are `trained`."""
    rendered, spans = render(tokenizer, messages, tools)
    assert rendered == text
    assert [rendered[slice(*span)] for span in spans] == trained
    (row,) = encode(tokenizer, messages, tools=tools)
    assert tokenizer.decode(row.input_ids) == text
    ids = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != NOT_TRAINED]
    assert tokenizer.decode(ids) == "".join(trained)


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_text_and_mask_are_those_built_by_hand(name: str, system: bool, tools_tokenizer: Any) -> None:
    messages, tools = ROWS[name]
    messages = messages if system else messages[1:]
    text, trained = written(messages, tools)
    check_row(tools_tokenizer, messages, tools, text, trained)


@pytest.mark.parametrize("name", ROWS)
def test_it_renders_tools_as_qwen_does(name: str, tools_tokenizer: Any) -> None:
    """Except for Qwen's own system message, which replaces a missing one."""
    messages, tools = ROWS[name]
    text = (files("trl") / "chat_templates" / "qwen2_5.jinja").read_text("utf-8")
    theirs = tools_tokenizer.apply_chat_template(messages, tools=tools, chat_template=text, tokenize=False)
    assert render(tools_tokenizer, messages, tools)[0] == theirs
    for before in range(1, len(messages)):
        if messages[before]["role"] == "assistant":
            prompts = [
                tools_tokenizer.apply_chat_template(
                    messages[:before], tools=tools, chat_template=template, tokenize=False, add_generation_prompt=True
                )
                for template in (text, tools_tokenizer.chat_template)
            ]
            assert prompts[0] == prompts[1]


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize(
    "messages",
    [
        [ASK, ANSWER],
        [SYSTEM, ASK, ANSWER, says("system", "Now in prose."), ASK, ANSWER],
        [says("system", ""), says("user", ""), says("assistant", ""), says("assistant", "More.")],
        [says("assistant", "Hello."), says("user", "<tools>\n</tools>")],
        [],
    ],
)
def test_without_tools_it_is_chatml_byte_for_byte(
    messages: list[dict[str, Any]], prompt: bool, tools_tokenizer: Any
) -> None:
    texts = [
        tools_tokenizer.apply_chat_template(
            [messages], chat_template=(TEMPLATES / f"{name}.jinja").read_text("utf-8"), tokenize=False,
            add_generation_prompt=prompt, tools=[] if name == "chatml-tools" else None,
        )[0]
        for name in ("chatml", "chatml-tools")
    ]  # fmt: skip
    assert texts[0] == texts[1]


def test_arguments_as_json_and_calls_without_a_wrapper_are_written_alike(tools_tokenizer: Any) -> None:
    forms = [
        OSLO,
        call("weather", json.dumps(OSLO["function"]["arguments"], ensure_ascii=False)),
        OSLO["function"],
    ]
    texts = {render(tools_tokenizer, [ASK, says("assistant", "", form)], [WEATHER])[0] for form in forms}
    assert len(texts) == 1
    content_is_none = {"role": "assistant", "content": None, "tool_calls": [OSLO]}
    assert {render(tools_tokenizer, [ASK, content_is_none], [WEATHER])[0]} == texts


def test_rows_of_other_formats_are_rendered_completely(tools_tokenizer: Any) -> None:
    """OpenAI's API, with JSON in strings, and ShareGPT's roles."""
    openai = {
        "messages": [
            SYSTEM, ASK, {"role": "assistant", "content": None, "tool_calls": [call("time", "{}", 2)]},
            {"role": "tool", "tool_call_id": "call2", "content": "noon"}, ANSWER,
        ],
        "tools": json.dumps([TIME]),
    }  # fmt: skip
    sharegpt = {
        "system": SYSTEM["content"],
        "conversations": [
            {"from": "human", "value": ASK["content"]},
            {"from": "function_call", "value": json.dumps({"name": "time", "arguments": {}})},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": ANSWER["content"]},
        ],
        "tools": [TIME["function"]],
    }
    expected = written([SYSTEM, ASK, says("assistant", "", NOW), says("tool", "noon"), ANSWER], [TIME])[0]
    for row, format in ((openai, "messages"), (sharegpt, "sharegpt")):
        messages, tools = convert(row, format)
        (encoded,) = encode(tools_tokenizer, messages, tools=tools)
        assert tools_tokenizer.decode(encoded.input_ids) == expected


LISTED = f"You call functions. They stand within <tools> </tools> tags:\n<tools>\n{json.dumps([WEATHER])}\n</tools>\n"
RESULT = '<tool_response>\n{"sky": "rain"}\n</tool_response>'
# of hermes-function-calling-v1: (messages, tools, whether the tools are written)
HERMES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None, bool]] = {
    "all of it": ([says("system", LISTED), ASK, says("assistant", "", OSLO), says("tool", RESULT), ANSWER], [WEATHER], False),
    "tools listed": ([says("system", LISTED), ASK, says("assistant", "", OSLO), says("tool", "rain"), ANSWER], [WEATHER], False),
    "tools listed on one line": ([says("system", "<tools>weather</tools>"), ASK, ANSWER], [WEATHER], False),
    "tools listed twice": ([says("system", LISTED + LISTED + "<tools></tools>"), ASK, ANSWER], [WEATHER], False),
    "a result": ([SYSTEM, ASK, says("assistant", "", OSLO), says("tool", f"{RESULT}\n"), ANSWER], [WEATHER], True),
    "two results": ([ASK, says("assistant", "", OSLO, NOW), says("tool", RESULT), says("tool", "noon"), ANSWER], [WEATHER], True),
    "two results in one": ([ASK, says("assistant", "", OSLO, NOW), says("tool", f"{RESULT}\n{RESULT}"), ANSWER], None, True),
    "tags without tools": ([says("system", "Tools are within <tools> </tools> tags."), ASK, ANSWER], [WEATHER], True),
    "an open tag": ([says("system", "Look behind <tools>."), ASK, ANSWER], [WEATHER], True),
    "tags within a result": ([ASK, says("assistant", "", OSLO), says("tool", f"So: {RESULT}"), ANSWER], [WEATHER], True),
    "tags in a question": ([SYSTEM, says("user", LISTED), ANSWER], [WEATHER], True),
}  # fmt: skip


@pytest.mark.parametrize("name", HERMES)
def test_content_with_tool_tags_is_not_tagged_twice(name: str, tools_tokenizer: Any) -> None:
    messages, tools, listed = HERMES[name]
    text, trained = written(messages, tools if listed else None)
    for message in messages:  # they are wrapped as any result, and then one pair of tags is taken away
        if message["role"] == "tool" and message["content"].startswith("<tool_response>"):
            wrapped = f"<tool_response>\n{message['content']}\n</tool_response>"
            assert wrapped in text
            text = text.replace(wrapped, message["content"])
    check_row(tools_tokenizer, messages, tools, text, trained)


def test_generation_stops_at_the_end_token_and_serving_needs_no_marks(tools_tokenizer: Any) -> None:
    assert SpanFinder(tools_tokenizer).stop_tokens == ["<|im_end|>"]
    plain = without_generation_marks(tools_tokenizer.chat_template)
    for messages, tools in ROWS.values():
        served = tools_tokenizer.apply_chat_template(messages, tools=tools, chat_template=plain, tokenize=False)
        assert served == render(tools_tokenizer, messages, tools)[0]


TOOL_ROWS = {
    "definitions alone": {"messages": [ASK, ANSWER], "tools": [WEATHER]},
    "a call": {"messages": [ASK, says("assistant", "", OSLO), says("tool", "rain"), ANSWER], "tools": [WEATHER]},
    "a call at the end": {"messages": [ASK, says("assistant", "", OSLO)]},
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", TOOL_ROWS)
def test_tool_data_under_a_template_without_tools_names_this_one(
    name: str, mixed: bool, recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = [TOOL_ROWS[name]] * 2 + ([{"messages": [ASK, ANSWER]}] if mixed else [])
    path = tmp_path / "tools.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = recipe_file(data={"sources": [{"path": str(path)}]})
    error = refused("--recipe", recipe, "--check")
    assert "`chat.template: chatml-tools`" in error
    assert "2 refused by the template, with tools" in error
    assert "Correct them" not in error
    assert "the right one" not in error


def test_other_control_tokens_are_refused_as_for_chatml(mistral_tokenizer_v1: Callable[[], Any]) -> None:
    with pytest.raises(UserError, match=r"<\|im_end\|>, <\|im_start\|>, which the tokenizer .* does not have"):
        use_template(mistral_tokenizer_v1(), "chatml-tools")
