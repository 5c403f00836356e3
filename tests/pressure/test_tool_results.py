"""Tool results in prompts: whether a template shows them, and the form that a server gets."""

import json
from pathlib import Path

from transformers import AutoTokenizer

from train.pressure.conversations import result_in_user_turn, tool_turns
from train.pressure.tool_results import arguments_as_text, has_tool_results, why_no_tool_turns

WITHOUT_TOOLS = (
    "{% for message in messages %}{% if message.role != 'tool' %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
)


def test_a_template_that_shows_tool_results_needs_nothing(smollm2: Path) -> None:
    assert why_no_tool_turns(AutoTokenizer.from_pretrained(smollm2), {}) == ""


def test_a_template_that_refuses_tool_results_says_why(tiny_chat_model: Path) -> None:
    why = why_no_tool_turns(AutoTokenizer.from_pretrained(tiny_chat_model), {})
    assert why == "the chat template refuses it: the template chatml has no turn for the role tool"


def test_a_template_that_drops_tool_results_is_seen(tiny_chat_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    tokenizer.chat_template = WITHOUT_TOOLS
    assert why_no_tool_turns(tokenizer, {}) == "the chat template leaves it out"


def test_the_result_moves_into_the_turn_of_the_question() -> None:
    system = {"role": "system", "content": "Be kind."}
    messages = [system, *tool_turns("Which way?", "Go north.")]
    assert has_tool_results(messages)
    assert result_in_user_turn(messages) == [
        system,
        {"role": "user", "content": "Which way?\n\nResult of the search:\nGo north."},
    ]
    assert not has_tool_results(result_in_user_turn(messages))


def test_a_server_gets_arguments_as_text_and_a_template_as_a_mapping() -> None:
    messages = tool_turns("Wo ist Öl?", "Dort.")
    text = arguments_as_text(messages)
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"query": "Wo ist Öl?"}
    assert json.loads(text[1]["tool_calls"][0]["function"]["arguments"]) == {"query": "Wo ist Öl?"}
    assert (text[0], text[2]) == (messages[0], messages[2])
