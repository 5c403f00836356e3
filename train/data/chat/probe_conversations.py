"""Small conversations that are rendered to learn how a template begins and ends answers."""

from typing import Any

from train.data.chat.rendering import Tools
from train.data.sources.formats import Message

QUESTION, ANSWER, NEXT, NAME, VALUE = (f"\ue000{word}\ue001" for word in ("ask", "say", "next", "name", "value"))
"""Characters for private use at both ends: no template writes them."""

RESULT: Message = {"role": "tool", "name": NAME, "tool_call_id": "abcdefghi", "content": NEXT}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": "A tool.",
            "parameters": {"type": "object", "properties": {"key": {"type": "string", "description": "Its key."}}},
        },
    }
]


def tools_for(messages: list[Message]) -> Tools:
    """The tools that `messages` need, if any."""
    return TOOLS if any("tool_calls" in message for message in messages) else None


def question(*answer: str) -> list[Message]:
    """A question, and any answers to it that follow one another."""
    turns: list[Message] = [{"role": "user", "content": QUESTION}]
    return turns + [{"role": "assistant", "content": text} for text in answer]


def call() -> list[Message]:
    """A question that is answered by calling a tool."""
    function = {"name": NAME, "arguments": {"key": VALUE}}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return [*question(), {"role": "assistant", "content": "", "tool_calls": calls}]


def probe_conversations() -> list[list[Message]]:
    """Conversations that templates are known to render in ways of their own."""
    two = [*question(ANSWER), {"role": "user", "content": NEXT}, {"role": "assistant", "content": VALUE}]
    reasoned = [two[0], {**two[1], "reasoning_content": NAME}]
    inline = [two[0], {**two[1], "content": f"<think>\n{NAME}\n</think>\n\n{ANSWER}"}]
    called = [*call(), RESULT, two[1], *two[2:]]
    return [two, reasoned, [*reasoned, *two[2:]], inline, [*inline, *two[2:]], called]
