"""Answer format of a chat template: how answers begin and end, learnt by rendering small conversations."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from train.data.chat.control_tokens import match_any, special_tokens
from train.data.chat.probe_conversations import (
    ANSWER,
    NAME,
    NEXT,
    QUESTION,
    RESULT,
    VALUE,
    call,
    question,
    tools_for,
)
from train.data.chat.rendering import Form, Span, Tools, render_row, show_sentinels
from train.data.chat.template import dated_template, has_generation_marks, template_name
from train.data.sources.formats import Message, RowError
from train.errors import UserError

_MODES = ("enable_thinking", "thinking")
"""Template variables that turn reasoning on or off."""


@dataclass(frozen=True, slots=True)
class Ending:
    """The text after an answer.

    - `written`: what the template writes; the model writes the first `produced` characters of it.
    - `following`: the token of the next turn that ends the answer, where the template has no end token of its own.
    """

    written: str
    produced: int
    following: str = ""


class AnswerFormat:
    """The format of answers under one tokenizer's chat template.

    - `marked`: the template has `{% generation %}` marks.
    - `form`: the form of messages that it takes.
    - `header`: length of the longest generation prompt: an answer's own text may begin this far before its span.
    - `ending`, `call_ending`: how answers end, without and with tool calls; None if that can't be found.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Probe the template. Raises UserError if it writes text of the conversation after an answer."""
        self.name = template_name(tokenizer)
        self.template = dated_template(tokenizer)
        self.eos = tokenizer.eos_token
        self._variables: dict[str, Any] = tokenizer.special_tokens_map
        self.special = match_any(special_tokens(tokenizer))
        # Gemma's added tokens are also line breaks and HTML tags: they end an answer only where nothing else does.
        self._added = match_any(token for token in tokenizer.get_added_vocab() if not token.isspace())
        self.marked = has_generation_marks(self.template)
        self._modes = [{name: on} for name in _MODES if name in self.template for on in (False, True)]
        self.form = self._find_form()
        self.header = self._find_header()
        self.ending = self._find_ending()
        self.call_ending = self._find_call_ending()

    @property
    def stop_tokens(self) -> list[str]:
        """The tokens at which generation stops: the end of an answer, then that of an answer with tool calls."""
        endings = [ending for ending in (self.ending, self.call_ending) if ending]
        stops = [ending.following or self._last_token(ending.written[: ending.produced]) for ending in endings]
        return list(dict.fromkeys(stops))

    def with_variables(self, kwargs: Mapping[str, Any]) -> "AnswerFormat":
        """Return this format with variables that a row sets for the template."""
        changed = copy.copy(self)
        changed._variables = {**self._variables, **kwargs}
        changed._modes = [mode for mode in self._modes if mode.keys().isdisjoint(kwargs)]
        return changed

    def modes(self) -> Iterator[dict[str, Any]]:
        """Yield the variables to try for a generation prompt: none, then reasoning off and on."""
        yield {}
        yield from self._modes

    def render(
        self, messages: list[Message], tools: Tools, form: Form | None = None, **options: Any
    ) -> tuple[str, list[Span]]:
        """Return the text and the generation marks of a conversation. Raises RowError if the template refuses it."""
        return render_row(
            messages,
            tools,
            form or self.form,
            self.template,
            marked=self.marked,
            variables={**options, **self._variables},
        )

    def try_render(self, messages: list[Message], form: Form | None = None, **options: bool) -> str | None:
        """Return the text of a probe conversation, or None if the template refuses it."""
        try:
            return self.render(messages, tools_for(messages), form, **options)[0]
        except RowError:
            return None

    def _find_form(self) -> Form:
        parts = False
        for parts in (False, True):
            text = self.try_render(question(ANSWER), Form(parts=parts))
            if text is not None and QUESTION in text and ANSWER in text:
                break
        else:
            parts = False
        for json_arguments in (False, True):
            for none_content in (False, True):
                form = Form(parts, json_arguments, none_content)
                text = self.try_render(call(), form)
                if text is not None and NAME in text and VALUE in text:
                    return form
        return Form(parts)

    def _find_header(self) -> int:
        plain = self.try_render(question())
        prompts = [self.try_render(question(), add_generation_prompt=True, **mode) for mode in self.modes()]
        return max((len(prompt) - len(plain) for prompt in prompts if prompt and plain is not None), default=0)

    def _find_ending(self) -> Ending | None:
        text = self.try_render(question(ANSWER))
        if text is None or ANSWER not in text:
            return None
        written = text.partition(ANSWER)[2]
        if ANSWER in written or QUESTION in written:
            raise UserError(
                f"chat.template: after an answer {self.name} writes {show_sentinels(written)!r}, which holds text of "
                "the conversation: other roles' text would be trained. Name a template that ends after the answer."
            )
        produced = self._length_of_end_tokens(written)
        if produced:
            return Ending(written, produced)
        following = self._following_token(text, {"role": "user", "content": NEXT}, question(ANSWER))
        return Ending(written, len(written), following) if following else None

    def _find_call_ending(self) -> Ending | None:
        """Return how an answer with tool calls ends; None if the template doesn't write calls."""
        text = self.try_render(call())
        if text is None or self.ending is None or VALUE not in text:
            return None  # the name alone may be in the list of tools
        if self.ending.following:
            following = self._following_token(text, RESULT, call())
            return Ending("", 0, following) if following else None
        tail = text[text.rfind(VALUE) :]
        if tail.endswith(self.ending.written):
            return self.ending
        runs = list(re.finditer(f"(?:{self.special.pattern})+", tail))
        if not runs or tail[runs[-1].end() :].strip():
            return None
        written = tail[runs[-1].start() :]
        return Ending(written, self._length_of_end_tokens(written))

    def _length_of_end_tokens(self, written: str) -> int:
        """Return the length of `written` up to the end of its first run of control tokens, or of eos in that run."""
        for tokens in (self.special, self._added):
            run = re.search(f"(?:{tokens.pattern})+", written)
            if run is not None:
                eos = run[0].find(self.eos) if self.eos else -1
                return run.end() if eos < 0 else run.start() + eos + len(self.eos)
        return 0

    def _following_token(self, text: str, message: Message, messages: list[Message]) -> str:
        """Return the control token that begins a turn after `messages`, which render as `text`; "" if there is none."""
        longer = self.try_render([*messages, message])
        if longer is None or not longer.startswith(text):
            return ""
        token = self.special.match(longer, len(text)) or self._added.match(longer, len(text))
        return token[0] if token else ""

    def _last_token(self, text: str) -> str:
        return (self.special.findall(text) or self._added.findall(text))[-1]
