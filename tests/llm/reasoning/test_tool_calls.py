"""Tool calls in the text are no answers; quoted ones are part of an answer."""

import pytest

from train.llm.reasoning import read_answer
from train.llm.request import Answer

CALLS = [
    '<tool_call>\n{"name": "search", "arguments": {"query": "Bern"}}\n</tool_call>',
    "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>Bern</arg_value>\n</tool_call>",
    "<tool_call>\n<function=search>\n<parameter=query>\nBern\n</parameter>\n</function>\n</tool_call>",
    '[TOOL_CALLS][{"name": "search", "arguments": {"query": "Bern"}}]',
    '[TOOL_CALLS]search[ARGS]{"query": "Bern"}',
    '<|python_tag|>search.call(query="Bern")',
    '<function=search>{"query": "Bern"}</function>',
    '<function_calls>\n<invoke name="search">\n<parameter name="query">Bern</parameter>\n</invoke>\n</function_calls>',
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.search:0<|tool_call_argument_begin|>{"query": "Bern"}'
    "<|tool_call_end|><|tool_calls_section_end|>",
    '<|tool_call_start|>[search(query="Bern")]<|tool_call_end|>',
    '<minimax:tool_call>\n<invoke name="search">\n</invoke>\n</minimax:tool_call>',
    '<TOOLCALL>[{"name": "search", "arguments": {}}]</TOOLCALL>',
    '<tool_calls>\n[{"name": "search", "arguments": {}}]\n</tool_calls>',
    '<|tool_call|>[{"name": "search", "arguments": {}}]',
    '<|action_start|><|plugin|>\n{"name": "search", "parameters": {}}<|action_end|>',
    'functools[{"name": "search", "arguments": {}}]',
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("before", ["", "\n", "I look it up.\n\n", "Let me see:\n", "<think>Hm.</think>\n\n"])
def test_a_tool_call_is_no_answer(call: str, before: str) -> None:
    for end in ("", "<|im_end|>", "\n" + call):
        read, reply = read_answer(Answer(f"{before}{call}{end}", "stop", None, 1, 1, 0.1))
        assert reply.calls_tool
        assert read.unfinished == "calls a tool"


def test_a_call_without_its_end_was_cut() -> None:
    read, _ = read_answer(Answer('<tool_call>\n{"name": "sea', "length", None, 1, 1, 0.1))
    assert read.cut


@pytest.mark.parametrize("call", CALLS)
def test_a_quoted_call_is_an_answer(call: str) -> None:
    for text in (
        f"```\n{call}\n```",
        f"Qwen writes calls like this:\n\n```text\n{call}\n```\n\nThe server parses them.",
        f"To look something up, Qwen writes:\n{call}",
        f"The format of the model is:\n\n{call}\n\nThe server parses it.",
    ):
        read, reply = read_answer(Answer(text, "stop", None, 1, 1, 0.1))
        assert not reply.calls_tool
        assert (read.text, read.unfinished) == (text, "")


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call> is the tag in which Qwen calls tools.",
        "[TOOL_CALLS] is a token of Mistral.",
        "Llama 3.1 calls tools after <|python_tag|>",
        "<function_calls> and <invoke> are tags of Claude.",
        "The template has <tool_call> and </tool_call>.",
    ],
)
def test_an_answer_may_mention_the_mark_of_a_call(text: str) -> None:
    read, _ = read_answer(Answer(text, "stop", None, 1, 1, 0.1))
    assert (read.text, read.unfinished) == (text, "")
