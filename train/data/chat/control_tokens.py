"""Control tokens typed in a message, such as `<|im_end|>` in a user's text.

A tokenizer makes a control token of such text wherever it is, so a message could end its own turn and open another in
any role (transformers#29279, #47822). `chat.control_tokens_in_text` decides:

- error: the row can't be trained (RowError).
- escape: a zero-width space (U+200B) is inserted after the first character, so the text reads the same and becomes
  ordinary tokens. Answers are trained in this form.
- allow: the text stays, and becomes control tokens. For data that means them.

A control token is one that the tokenizer marks as special. Added tokens that aren't (Qwen3's <think>, <tool_call>) are
for messages to use. Markers that are ordinary text ([INST] in Mistral 7B v0.1, "### User:") are not found.
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from train.data.sources.formats import Message, RowError
from train.errors import UserError

Policy = Literal["error", "escape", "allow"]

ZERO_WIDTH_SPACE = "\u200b"
_ERROR = "control token in text, which `chat.control_tokens_in_text: escape` would break up and `allow` would keep"


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the tokens that the tokenizer marks as special, the longest first."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return _longest_first(special | set(tokenizer.all_special_tokens))


def match_any(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of the tokens, the longest first."""
    return re.compile("|".join(map(re.escape, _longest_first(tokens))) or "(?!)")  # (?!) never matches


def _longest_first(tokens: Iterable[str]) -> list[str]:
    return sorted({token for token in tokens if token}, key=lambda token: (-len(token), token))


class ControlTokens:
    """The control tokens of one tokenizer, and the policy for those typed in text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, policy: Policy) -> None:
        """Collect the tokenizer's control tokens, once for many rows.

        Raises UserError under `escape` if the tokenizer ignores the zero-width space.
        """
        special = special_tokens(tokenizer)
        self._pattern = match_any(special)
        self._policy = policy
        if policy == "escape":
            self._check_escape(tokenizer, special)

    def _check_escape(self, tokenizer: PreTrainedTokenizerBase, tokens: list[str]) -> None:
        ids = set(tokenizer.convert_tokens_to_ids(tokens))
        for token in tokens:
            escaped = _escape(token)
            if not self._pattern.search(escaped) and ids.intersection(
                tokenizer(escaped, add_special_tokens=False)["input_ids"]
            ):
                raise UserError(
                    f"chat.control_tokens_in_text: escape: the tokenizer of {tokenizer.name_or_path} makes a control "
                    f"token of {token} also with a zero-width space in it. Write `error`."
                )

    def clean(self, messages: list[Message]) -> list[Message]:
        """Apply the policy to messages; the same list is returned if nothing changes.

        All texts but the role are searched: contents, reasoning, names and arguments of tool calls.
        Raises RowError for a control token under `error`, and under `escape` for one that can't be broken up.
        """
        if self._policy == "allow":
            return messages
        cleaned = messages
        for number, message in enumerate(messages):
            for key, value in message.items():
                if key == "role" or (isinstance(value, str) and not self._pattern.search(value)):
                    continue
                new = self._clean(value, f"the {key} of message {number + 1} ({message['role']})")
                if new != value:
                    if cleaned is messages:
                        cleaned = list(messages)
                    cleaned[number] = {**cleaned[number], key: new}
        return cleaned

    def clean_value(self, value: Any, where: str) -> Any:
        """Apply the policy to all texts in a value, which errors name as `where`. Raises RowError."""
        return value if value is None or self._policy == "allow" else self._clean(value, where)

    def _clean(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return {self._clean(key, where): self._clean(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(item, where) for item in value]
        match = self._pattern.search(value) if isinstance(value, str) else None
        if match is None:
            return value
        if self._policy == "error":
            raise RowError(_ERROR, f"{match[0]} in {where}")
        escaped = self._pattern.sub(lambda token: _escape(token[0]), value)
        remaining = self._pattern.search(escaped)
        if remaining is not None:
            raise RowError("control token in text that can't be broken up", f"{remaining[0]} in {where}")
        return escaped


def _escape(token: str) -> str:
    return token[0] + ZERO_WIDTH_SPACE + token[1:]
