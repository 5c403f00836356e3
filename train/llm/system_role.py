"""System messages for a model without a system role."""

from collections.abc import Mapping, Sequence
from typing import Any


def merge_into_user(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages with what the system message says in the first user turn, before its text and a blank line.

    A conversation without a user turn gets one. An empty system message counts as none.
    """
    text = "\n\n".join(message["content"] for message in messages if _is_system(message) and message["content"].strip())
    rest = [message for message in messages if not _is_system(message)]
    if not text:
        return rest
    for number, message in enumerate(rest):
        if message["role"] == "user":
            rest[number] = {**message, "content": f"{text}\n\n{message['content']}"}
            return rest
    return [{"role": "user", "content": text}, *rest]


def _is_system(message: Mapping[str, Any]) -> bool:
    return bool(message["role"] == "system")
