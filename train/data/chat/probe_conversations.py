"""Probe conversations: small ones that are rendered to learn how a template begins and ends answers."""

from typing import Any

from train.data.chat.rendering import Tools
from train.data.sources.formats import Message

QUESTION, ANSWER, NEXT, NAME, VALUE = (f"\ue000{word}\ue001" for word in ("ask", "say", "next", "name", "value"))
"""Sentinels: texts between private-use characters, which no template writes."""

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
    """Return the tools that `messages` need, if any."""
    return TOOLS if any("tool_calls" in message for message in messages) else None


def question(*answer: str) -> list[Message]:
    """Return a question and consecutive answers to it."""
    turns: list[Message] = [{"role": "user", "content": QUESTION}]
    return turns + [{"role": "assistant", "content": text} for text in answer]


def call() -> list[Message]:
    """Return a question that is answered by calling a tool."""
    function = {"name": NAME, "arguments": {"key": VALUE}}
    calls = [{"id": "abcdefghi", "type": "function", "function": function}]
    return [*question(), {"role": "assistant", "content": "", "tool_calls": calls}]


def probe_conversations() -> list[list[Message]]:
    """Return conversations that templates render in different ways: turns, reasoning, tool calls."""
    two_turns = [*question(ANSWER), {"role": "user", "content": NEXT}, {"role": "assistant", "content": VALUE}]
    asked, answered, *rest = two_turns
    reasoned = [asked, {**answered, "reasoning_content": NAME}]
    inline = [asked, {**answered, "content": f"<think>\n{NAME}\n</think>\n\n{ANSWER}"}]
    called = [*call(), RESULT, answered, *rest]
    return [two_turns, reasoned, [*reasoned, *rest], inline, [*inline, *rest], called]
