"""System messages for a model without a system role."""

from collections.abc import Mapping, Sequence
from typing import Any


def merge_into_user(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages with the system message in the first user turn, before its text and a blank line.

    A conversation without a user turn gets one. An empty system message is dropped.
    """
    rest = [message for message in messages if message["role"] != "system"]
    texts = [message["content"] for message in messages if message["role"] == "system"]
    text = "\n\n".join(text for text in texts if text.strip())
    if not text:
        return rest
    for number, message in enumerate(rest):
        if message["role"] == "user":
            rest[number] = {**message, "content": f"{text}\n\n{message['content']}"}
            return rest
    return [{"role": "user", "content": text}, *rest]
