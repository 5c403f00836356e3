"""Where in a rendered conversation the text stands that the model must write, for any chat template.

Found by rendering, never by reading the template. For the answer in message i,

    prompt = render(messages[:i], add_generation_prompt=True)    what a server gives the model
    turn   = render(messages[:i + 1])                            prompt, answer and what the template writes after it

and the trained text is what `turn` has beyond `prompt`, up to and including the end token. So:

- A `<think>` block that the template writes after the generation prompt is trained; one that the prompt holds is not.
  Likewise the header of the answer: it is trained only where the template's generation prompt leaves it to the model.
- What follows the end token is not trained: the line break after ChatML's `<|im_end|>`, Phi-3's `<|endoftext|>` after
  `<|end|>` and a line break. Generation stops at the end token, so nobody ever sees the model write them.
- Several end tokens without anything between are all trained, up to eos (Cohere2: `<|END_RESPONSE|>` and
  `<|END_OF_TURN_TOKEN|>`).
- Where an answer is ended by the token that begins the next turn (GLM's `<|user|>`, `<|observation|>`; slime#514), that
  token is trained. After the last turn there is none: the one that the template writes before a user (after tool calls:
  before a tool's result) is added, as the model has to write it for the server to stop.
- Where the template rewrites earlier turns as a conversation goes on (Qwen3 drops `<think>`, gpt-oss turns `<|return|>`
  into `<|end|>`; Automodel#3024), turns share a row only where the one render holds each as it was when it was written.
  The others get rows of their own that end with them.
- Where the template merges answers that follow one another, they are trained as the one that they became.
- A prompt that ends in a way in which no answer begins (`<think>` before answers without reasoning) is tried with
  `enable_thinking` or `thinking` false and true, where the template knows these. If none fits, the row is refused:
  the model would never see the text in front of which it is to answer.

`{% generation %}` marks narrow this down: trained is what both allow. TRL's training templates have the line break
after `<|im_end|>` inside the marks, gpt-oss's the header that is part of the prompt; neither is the model's to write.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from train.data.chat.probe_conversations import (
    ANSWER,
    NAME,
    NEXT,
    QUESTION,
    RESULT,
    VALUE,
    call,
    probe_conversations,
    question,
    tools_for,
)
from train.data.chat.rendering import (
    Form,
    Rendering,
    Span,
    Tools,
    check_answer,
    check_others,
    left_out,
    named,
    render_row,
)
from train.data.chat.template import dated_template, has_generation_marks, template_name
from train.data.sources.formats import Message, RowError
from train.data.sources.unread_text import Unread
from train.errors import UserError

TrainOn = Literal["assistant", "last"]

_MODES = ("enable_thinking", "thinking")


@dataclass(frozen=True, slots=True)
class _Ending:
    """How answers end. `written`: what the template puts after one, of which the model writes `produced` characters.

    `following`: the token of the next turn that ends the answer, where the template has no end token of its own.
    """

    written: str
    produced: int
    following: str = ""


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer to train. `row`: the conversation up to it, as a row of its own; `end`: where its end token does."""

    first: int  # message that it begins with: an earlier one where the template merges answers
    last: int
    row: str
    end: int
    spans: list[Span]


class SpanFinder:
    """Finds the spans under one tokenizer's chat template, of which it learns all once, when made."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Render some small conversations to see how answers begin and end.

        Raises UserError where no answer could be trained under this template at all.
        """
        self._name = template_name(tokenizer)
        self._template = dated_template(tokenizer)
        self._variables = tokenizer.special_tokens_map
        self._eos = tokenizer.eos_token
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._special = _any_of(special)
        # Gemma's added tokens are also line breaks and HTML tags: they end an answer only where nothing else does.
        self._added = _any_of(token for token in tokenizer.get_added_vocab() if not token.isspace())
        self._marked = has_generation_marks(self._template)
        self._modes = [{name: on} for name in _MODES if name in self._template for on in (False, True)]
        self._form = self._find_form()
        self._header = self._find_header()
        self._ending = self._find_ending()
        self._call_ending = self._find_call_ending()
        self._marks_suffice = False
        if not self._marked:
            self._check()
        elif self._ending is not None:
            one = self._try(question(ANSWER), self._form) and len(self._render(question(ANSWER), None)[1]) == 1
            self._marks_suffice = bool(one) and all(map(self._marks_agree, probe_conversations()))

    @property
    def stop_tokens(self) -> list[str]:
        """The tokens at which generation is to stop: the end of an answer, then that of one that calls tools."""
        endings = [ending for ending in (self._ending, self._call_ending) if ending]
        stops = [ending.following or self._last_token(ending.written[: ending.produced]) for ending in endings]
        return list(dict.fromkeys(stops))

    def _last_token(self, text: str) -> str:
        return (self._special.findall(text) or self._added.findall(text))[-1]

    # -- what the template is like

    def _find_form(self) -> Form:
        parts = False
        for parts in (False, True):
            text = self._try(question(ANSWER), Form(parts=parts))
            if text is not None and QUESTION in text and ANSWER in text:
                break
        else:
            parts = False
        for json_arguments in (False, True):
            for none_content in (False, True):
                form = Form(parts, json_arguments, none_content)
                text = self._try(call(), form)
                if text is not None and NAME in text and VALUE in text:
                    return form
        return Form(parts)

    def _find_header(self) -> int:
        """Length of the longest generation prompt: so far before a span may the answer's own text begin."""
        plain = self._try(question(), self._form)
        prompts = [self._try(question(), self._form, add_generation_prompt=True, **mode) for mode in self._all_modes()]
        return max((len(prompt) - len(plain) for prompt in prompts if prompt and plain is not None), default=0)

    def _find_ending(self) -> _Ending | None:
        text = self._try(question(ANSWER), self._form)
        if text is None or ANSWER not in text:
            return None
        written = text.partition(ANSWER)[2]
        if ANSWER in written or QUESTION in written:
            raise UserError(
                f"chat.template: after an answer {self._name} writes {named(written)!r}, with text of the "
                "conversation in it: what others say would be trained. Name a template that ends after the answer."
            )
        produced = self._end_of_tokens(written)
        if produced:
            return _Ending(written, produced)
        following = self._following(text, {"role": "user", "content": NEXT}, question(ANSWER))
        return _Ending(written, len(written), following) if following else None

    def _find_call_ending(self) -> _Ending | None:
        """How an answer ends that calls tools; None where the template doesn't write calls."""
        text = self._try(call(), self._form)
        if text is None or self._ending is None or VALUE not in text:
            return None  # the name alone may stand among the tools
        if self._ending.following:
            following = self._following(text, RESULT, call())
            return _Ending("", 0, following) if following else None
        tail = text[text.rfind(VALUE) :]
        if tail.endswith(self._ending.written):
            return self._ending
        runs = list(re.finditer(f"(?:{self._special.pattern})+", tail))
        if not runs or tail[runs[-1].end() :].strip():
            return None
        written = tail[runs[-1].start() :]
        return _Ending(written, self._end_of_tokens(written))

    def _end_of_tokens(self, written: str) -> int:
        """Length of `written` up to the end of its first control tokens that stand side by side, or up to eos there."""
        for tokens in (self._special, self._added):
            run = re.search(f"(?:{tokens.pattern})+", written)
            if run is not None:
                eos = run[0].find(self._eos) if self._eos else -1
                return run.end() if eos < 0 else run.start() + eos + len(self._eos)
        return 0

    def _following(self, text: str, message: Message, messages: list[Message]) -> str:
        """The control token that a turn begins with when it follows `messages`, which render as `text`; or nothing."""
        longer = self._try([*messages, message], self._form)
        if longer is None or not longer.startswith(text):
            return ""
        token = self._special.match(longer, len(text)) or self._added.match(longer, len(text))
        return token[0] if token else ""

    def _check(self) -> None:
        """Raise UserError where a plain question and answer can't be trained, and one with reasoning can't either."""
        text = self._try(question(ANSWER), self._form)
        if text is None or ANSWER not in text:
            return  # a template of its own kind: its rows will tell
        if self._ending is None:
            after = text.partition(ANSWER)[2]
            raise UserError(
                f"chat.template: after an answer {self._name} writes {after!r}, in which there is no "
                "control token of the tokenizer, so a model trained with it would never stop. Name a template that "
                f"ends answers with {self._eos or 'an end token'}."
            )
        refused: RowError | None = None
        for messages in probe_conversations():
            try:
                tools = tools_for(messages)
                self._turn(messages, len(messages) - 1, tools, self._render(messages, tools))
            except RowError as fault:
                refused = fault if fault.kind == _NO_PROMPT or refused is None else refused
            else:
                return
        if refused is not None and refused.kind == _NO_PROMPT:
            raise UserError(
                f"chat.template: {self._name} can't be trained: {named(refused.detail)}. Name a template whose answers "
                "begin as its generation prompt ends."
            )

    def _marks_agree(self, messages: list[Message]) -> bool:
        """Whether one render with its marks gives what the renders of each turn give, or refuses what they refuse.

        Or gives nothing, so that those are asked.
        """
        wanted = _answers(messages)
        tools = tools_for(messages)
        outcomes: list[Any] = []
        for find in (self._by_marks, self._split):
            try:
                outcomes.append(find(messages, wanted, tools, *self._render(messages, tools)))
            except RowError as fault:
                outcomes.append(fault.kind)
        return outcomes[0] in ([], outcomes[1])

    # -- rows

    def with_variables(self, kwargs: Mapping[str, Any] | None) -> "SpanFinder":
        """Return the spans under this template with variables that a row sets. What was learnt of it stays."""
        if not kwargs:
            return self
        spans = copy.copy(self)
        spans._variables = {**self._variables, **kwargs}
        spans._modes = [mode for mode in self._modes if mode.keys().isdisjoint(kwargs)]
        spans._marks_suffice = False  # that was found out without these variables
        return spans

    def left_out(
        self, messages: list[Message], tools: Tools, kwargs: Mapping[str, Any] | None, renderings: list[Rendering]
    ) -> Unread:
        """Return what the template leaves out of a conversation beside its contents."""
        if tools is None and not kwargs and all(message.keys() <= _ALWAYS_CHECKED for message in messages):
            return {}
        return left_out(messages, tools, kwargs or {}, self._template, [rendering.text for rendering in renderings])

    def rows(self, messages: list[Message], tools: Tools, train_on: TrainOn) -> list[Rendering]:
        """One conversation as the rows to train, in its order, each verified against the messages.

        A message with `train: false` is part of the conversation and not trained. Several rows: see above.
        Raises RowFault where the template refuses the conversation, loses a message or doesn't let the model's part
        be told from the rest.
        """
        try:
            return self._rows(messages, tools, train_on)
        except RowError as fault:
            if self._call_ending is None and fault.kind.endswith("by the template") and _has_tools(messages, tools):
                raise RowError(NO_TOOLS, fault.detail) from fault
            raise

    def _rows(self, messages: list[Message], tools: Tools, train_on: TrainOn) -> list[Rendering]:
        wanted = [number for number in _answers(messages) if messages[number].get("train", True)]
        wanted = wanted[-1:] if train_on == "last" else wanted
        if not wanted:
            raise RowError("nothing to train", "no assistant turn that is to be trained")
        text, marks = self._render(messages, tools)
        by_marks = self._by_marks(messages, wanted, tools, text, marks) if self._marks_suffice else []
        return by_marks or self._split(messages, wanted, tools, text, marks)

    def _by_marks(
        self, messages: list[Message], wanted: list[int], tools: Tools, text: str, marks: list[Span]
    ) -> list[Rendering]:
        """The row from its marks alone; none where they are not one to an answer, or don't end as answers do."""
        answers = _answers(messages)
        if len(answers) != len(marks):
            return []
        spans = []
        for number, (start, end) in zip(answers, marks, strict=True):
            ending = self._call_ending if messages[number].get("tool_calls") else self._ending
            if ending is None:
                return []
            if text.endswith(ending.written, start, end):
                end -= len(ending.written) - ending.produced
            elif not text.endswith(ending.written[: ending.produced], start, end):
                return []
            check_answer(messages[number], text[start:end])
            if number in wanted:
                spans.append((start, end))
        rendering = Rendering(text, spans)
        check_others(messages, tools, rendering)
        return [rendering]

    def _split(
        self, messages: list[Message], wanted: list[int], tools: Tools, text: str, marks: list[Span]
    ) -> list[Rendering]:
        """As few rows as hold every wanted turn as it was when the model wrote it."""
        last = len(messages) - 1
        turns: list[_Turn] = []
        for number in reversed(wanted):
            if turns and turns[-1].first <= number:
                continue  # part of the turn that it was merged into
            rendered = (text, marks) if number == last else self._render(messages[: number + 1], tools)
            turn = self._turn(messages, number, tools, rendered)
            if not all(message.get("train", True) for message in messages[turn.first : number]):
                raise RowError("answers merged by the template", f"message {number + 1} with one that isn't trained")
            turns.append(turn)
        renderings: list[Rendering] = []
        while turns:
            turn = turns[0]
            whole = text.startswith(turn.row[: turn.end])
            row = text if whole else turn.row
            held = [other for other in turns if row.startswith(other.row[: other.end])]
            turns = [other for other in turns if other not in held]
            rendering = Rendering(row, [span for other in reversed(held) for span in other.spans])
            check_others(messages if whole else messages[: turn.last + 1], tools, rendering)
            renderings.append(rendering)
        return renderings[::-1]

    def _turn(self, messages: list[Message], number: int, tools: Tools, rendered: tuple[str, list[Span]]) -> _Turn:
        """The answer in message `number`, from the render up to it."""
        text, marks = rendered
        first, start = self._start(messages, number, tools, text)
        marks = [mark for mark in marks if mark[1] > start]
        if self._marked and not marks:
            raise RowError("not marked by the template", f"message {number + 1}, an answer")
        window = text[max(0, start - self._header) :]
        for answer in messages[first : number + 1]:
            check_answer(answer, window)
        calls = bool(messages[number].get("tool_calls"))
        ending = self._call_ending if calls else self._ending
        if calls and ending is None and self._ending is not None:
            raise RowError("tool call lost by the template", "it doesn't write calls, or nothing that ends them")
        if ending is None or not text.endswith(ending.written):
            kind = "end token not marked by the template" if self._marked else "end token not found"
            raise RowError(kind, f"message {number + 1} ends with {text[start:][-40:]!r}")
        end = len(text) - len(ending.written) + ending.produced
        row = text
        if ending.following:
            row += self._next_token(messages, number, tools, text) or ending.following
            end = len(row)
        if end <= start:
            raise RowError("nothing to train", f"message {number + 1} is all in the generation prompt")
        end_token = row[len(text) : end] or ending.written[: ending.produced].strip()
        _check_ends(messages[first : number + 1], row[start:end], end_token)
        spans = [(start, end)]
        if self._marked:
            spans = [(max(start, mark[0]), min(end, mark[1])) for mark in marks if mark[0] < end]
            spans = [span for span in spans if span[0] < span[1]]
            if not spans or spans[-1][1] < end:
                raise RowError("end token not marked by the template", f"{text[end - 20 : end]!r} is not trained")
            if len(spans) == 1:
                check_answer(messages[number], text[max(0, spans[0][0] - self._header) : end], last_part=True)
        return _Turn(first, number, row, end, spans)

    def _next_token(self, messages: list[Message], number: int, tools: Tools, text: str) -> str:
        """The control token with which the message after `number` begins, if it does and leaves `text` as it is."""
        if number + 1 == len(messages):
            return ""
        longer, _ = self._render(messages[: number + 2], tools)
        token = self._special.match(longer, len(text)) if longer.startswith(text) else None
        return token[0] if token else ""

    def _start(self, messages: list[Message], number: int, tools: Tools, text: str) -> tuple[int, int]:
        """Where the model begins to write answer `number` in `text`, and the message that this writing begins with."""
        run = number
        while run and messages[run - 1]["role"] == "assistant":
            run -= 1
        shown = ""
        for first in dict.fromkeys((number, run)):
            for mode in self._all_modes():
                try:
                    prompt, _ = self._render(messages[:first], tools, None, add_generation_prompt=True, **mode)
                except RowError as fault:
                    shown = shown or f"the template can't prompt for message {number + 1} ({fault.detail})"
                    continue
                if text.startswith(prompt):
                    return first, len(prompt)
                shown = shown or _difference(prompt, text)
        raise RowError(_NO_PROMPT, shown)

    def _all_modes(self) -> Iterator[dict[str, Any]]:
        yield {}
        yield from self._modes

    def _render(
        self, messages: list[Message], tools: Tools, form: Form | None = None, **options: Any
    ) -> tuple[str, list[Span]]:
        """Text and marks of one conversation. Raises RowFault where the template refuses it."""
        return render_row(
            messages,
            tools,
            form or self._form,
            self._template,
            marked=self._marked,
            variables={**options, **self._variables},
        )

    def _try(self, messages: list[Message], form: Form, **options: bool) -> str | None:
        try:
            return self._render(messages, tools_for(messages), form, **options)[0]
        except RowError:
            return None


_ALWAYS_CHECKED = {"role", "content", "train"}
_NO_PROMPT = "answer doesn't follow its prompt"
NO_TOOLS = "refused by the template, with tools in the conversation"
"""The kind of fault of a row that another template could write."""


def _has_tools(messages: list[Message], tools: Tools) -> bool:
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _answers(messages: list[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _any_of(tokens: Any) -> re.Pattern[str]:
    longest_first = sorted({token for token in tokens if token}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) is found nowhere


def _check_ends(answers: list[Message], written: str, end_token: str) -> None:
    """Raise RowFault where the model would go on after an end token: what a template writes there is not the model's.

    Those that an answer holds itself (`control_tokens_in_text: allow`) and those between merged answers don't count.
    """
    own = sum(str(value).count(end_token) for answer in answers for value in answer.values())
    if written.count(end_token) > own + len(answers):
        raise RowError("text after the end of an answer", f"{end_token} stands within {written[:80]!r}")


def _difference(prompt: str, text: str) -> str:
    """In words: where the generation prompt and the conversation part."""
    same = next((at for at, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(text))
    here, there = (named(rest[same : same + 60])[:40] for rest in (prompt, text))
    return f"its generation prompt goes on with {here!r} where the conversation goes on with {there!r}"
