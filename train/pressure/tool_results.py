"""Tool results in prompts: as turns of their own, or as text in the user's turn for a template without tool turns."""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from train.pressure.conversations import Message, tool_turns

if TYPE_CHECKING:  # importing it takes a second
    from transformers import PreTrainedTokenizerBase

_RESULT = "The gate opens at nine."
_QUESTION = "When does the gate open?"


def has_tool_results(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a conversation has a tool result."""
    return any(message["role"] == "tool" for message in messages)


def why_no_tool_turns(tokenizer: "PreTrainedTokenizerBase", options: Mapping[str, Any]) -> str:
    """Return why the template of `tokenizer` can't show a tool result; empty if it does.

    `options`: further arguments of the template.
    """
    conversation = [{"role": "system", "content": "Be kind."}, *tool_turns(_QUESTION, _RESULT)]
    try:
        text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **options)
    except Exception as error:  # templates raise errors of their own
        return f"the chat template refuses it: {error}"
    return "" if _RESULT in str(text) else "the chat template leaves it out"


def arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the arguments of tool calls as JSON text, as the API of servers wants them.

    Chat templates want them as a mapping.
    """
    return [
        message | {"tool_calls": [_with_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}
