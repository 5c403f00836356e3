"""Assistant spans: the text in a rendered conversation that the model must write, for any chat template.

They are found by rendering, never by reading the template. For the answer in message i,

    prompt = render(messages[:i], add_generation_prompt=True)    the model's input at inference
    turn   = render(messages[:i + 1])                            prompt, answer and what the template writes after it

and the trained text is what `turn` has beyond `prompt`, up to and including the end token:

    prompt   <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n
    turn     <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
    trained                                                         Hello<|im_end|>

- A `<think>` block that the template writes after the generation prompt is trained; one in the prompt is not. Likewise
  the header of the answer: it is trained only if the generation prompt leaves it to the model.
- Text after the end token is not trained: the line break after ChatML's `<|im_end|>`, Phi-3's `<|endoftext|>` after
  `<|end|>` and a line break. Generation stops at the end token, so the model never writes them.
- Several adjacent end tokens are all trained, up to eos (Cohere2: `<|END_RESPONSE|>` and `<|END_OF_TURN_TOKEN|>`).
- Where the token that begins the next turn ends an answer (GLM's `<|user|>`, `<|observation|>`; slime#514), that token
  is trained. After the last turn there is none, so the one before a user turn (after tool calls: before a tool's
  result) is added, as the model must write it for the server to stop.
- Where the template rewrites earlier turns as a conversation continues (Qwen3 drops `<think>`, gpt-oss turns
  `<|return|>` into `<|end|>`; Automodel#3024), turns share a row only if one render holds each of them as it was when
  it was written. The others get rows of their own that end with them.
- Where the template merges consecutive answers, they are trained as one.
- If no answer follows a prompt (`<think>` before answers without reasoning), it is tried with `enable_thinking` or
  `thinking` false and true, where the template knows these. If none fits, the row is refused: the model would never see
  the text after which it has to answer.

`{% generation %}` marks narrow this down: only what both allow is trained. TRL's training templates have the line break
after `<|im_end|>` inside the marks, gpt-oss's the header that is part of the prompt; the model writes neither.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from train.data.chat.answer_format import AnswerFormat
from train.data.chat.pieces import PieceJoiner
from train.data.chat.probe_conversations import ANSWER, probe_conversations, question, tools_for
from train.data.chat.rendering import (
    Rendering,
    Span,
    Tools,
    check_answer,
    check_others,
    find_left_out,
    show_sentinels,
)
from train.data.sources.formats import Message, RowError
from train.data.sources.loss_weights import LOSS_WEIGHT, weight_of
from train.data.sources.unread_text import Unread
from train.errors import UserError

TrainOn = Literal["assistant", "last"]

NO_TOOLS = "refused by the template, with tools in the conversation"
"""The kind of error of a row that a template with tools could write."""
_NO_PROMPT = "answer doesn't follow its prompt"
_ALWAYS_CHECKED = {"role", "content", "train", LOSS_WEIGHT}
"""Message keys that `check_answer` and `check_others` cover, and those that no template writes."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """One answer to train, of messages `first` to `last` (several where the template merges answers).

    `row`: the text of the conversation up to it, as a row of its own; `end`: the end of its end token there; `weight`:
    its loss weight.
    """

    first: int
    last: int
    row: str
    end: int
    spans: list[Span]
    weight: float


class SpanFinder:
    """Finds the assistant spans under one tokenizer's chat template, which it probes once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, fast: bool = False) -> None:
        """Probe the template. Raises UserError if no answer can be trained under it.

        `fast`: join rows of the template's fixed pieces where it has such (`PieceJoiner`).
        """
        self._joiners: dict[TrainOn, PieceJoiner] | None = {} if fast else None
        self._format = AnswerFormat(tokenizer)
        self._marks_suffice = False
        if not self._format.marked:
            self._check_template()
        elif self._format.ending is not None:
            one_mark = (
                self._format.try_render(question(ANSWER)) and len(self._format.render(question(ANSWER), None)[1]) == 1
            )
            self._marks_suffice = bool(one_mark) and all(map(self._marks_agree, probe_conversations()))

    @property
    def stop_tokens(self) -> list[str]:
        """The tokens at which generation stops: the end of an answer, then that of an answer with tool calls."""
        return self._format.stop_tokens

    def with_variables(self, kwargs: Mapping[str, Any] | None) -> "SpanFinder":
        """Return a finder with variables that a row sets for the template, without probing again."""
        if not kwargs:
            return self
        finder = copy.copy(self)
        finder._format = self._format.with_variables(kwargs)
        finder._marks_suffice, finder._joiners = False, None  # those were found out without these variables
        return finder

    def find_left_out(
        self, messages: list[Message], tools: Tools, kwargs: Mapping[str, Any] | None, renderings: list[Rendering]
    ) -> Unread:
        """Return the texts of a conversation, except contents, that the template leaves out."""
        if tools is None and not kwargs and all(message.keys() <= _ALWAYS_CHECKED for message in messages):
            return {}
        texts = [rendering.text for rendering in renderings]
        return find_left_out(messages, tools, kwargs or {}, self._format.template, texts)

    def rows(self, messages: list[Message], tools: Tools, train_on: TrainOn) -> list[Rendering]:
        """Return the rows to train of one conversation, in its order, each verified against the messages.

        There are several rows where the template rewrites earlier turns. A message with `train: false` is part of the
        conversation and not trained.
        Raises RowError if the template refuses the conversation, loses a message, or the model's part can't be
        separated from the rest; ShortcutError if rows of fixed pieces turn out to differ.
        """
        if self._joiners is not None and not tools:
            if train_on not in self._joiners:
                render = partial(self._rows, tools=None, train_on=train_on)
                self._joiners[train_on] = PieceJoiner(self._format.template, render)
            row = self._joiners[train_on].join(messages)
            if row is not None:
                return [row]
        try:
            return self._rows(messages, tools, train_on)
        except RowError as error:
            no_calls = self._format.call_ending is None
            if no_calls and error.kind.endswith("by the template") and _has_tools(messages, tools):
                raise RowError(NO_TOOLS, error.detail) from error
            raise

    def _rows(self, messages: list[Message], tools: Tools, train_on: TrainOn) -> list[Rendering]:
        targets = [number for number in _answers(messages) if weight_of(messages[number])]
        targets = targets[-1:] if train_on == "last" else targets
        if not targets:
            raise RowError("nothing to train", "no assistant turn that is to be trained")
        text, marks = self._format.render(messages, tools)
        by_marks = self._by_marks(messages, targets, tools, text, marks) if self._marks_suffice else []
        return by_marks or self._by_prompts(messages, targets, tools, text, marks)

    def _by_marks(
        self, messages: list[Message], targets: list[int], tools: Tools, text: str, marks: list[Span]
    ) -> list[Rendering]:
        """Return the row by its marks alone; [] if there isn't one per answer, or one doesn't end as answers do."""
        answers = _answers(messages)
        if len(answers) != len(marks):
            return []
        spans, weights = [], []
        for number, (start, end) in zip(answers, marks, strict=True):
            ending = self._format.call_ending if messages[number].get("tool_calls") else self._format.ending
            if ending is None:
                return []
            if text.endswith(ending.written, start, end):
                end -= len(ending.written) - ending.produced
            elif not text.endswith(ending.written[: ending.produced], start, end):
                return []
            check_answer(messages[number], text[start:end])
            if number in targets:
                spans.append((start, end))
                weights.append(weight_of(messages[number]))
        rendering = _render_spans(text, spans, weights)
        check_others(messages, tools, rendering)
        return [rendering]

    def _by_prompts(
        self, messages: list[Message], targets: list[int], tools: Tools, text: str, marks: list[Span]
    ) -> list[Rendering]:
        """Return as few rows as hold every target as it was when the model wrote it."""
        last = len(messages) - 1
        turns: list[_Turn] = []
        for number in reversed(targets):
            if turns and turns[-1].first <= number:
                continue  # part of the turn that it was merged into
            rendered = (text, marks) if number == last else self._format.render(messages[: number + 1], tools)
            turn = self._find_turn(messages, number, tools, rendered)
            for message in messages[turn.first : number]:
                if weight_of(message) != turn.weight:
                    kind = "of another loss weight" if weight_of(message) else "that isn't trained"
                    raise RowError("answers merged by the template", f"message {number + 1} with one {kind}")
            turns.append(turn)
        renderings: list[Rendering] = []
        while turns:
            turn = turns[0]
            is_complete = text.startswith(turn.row[: turn.end])
            row = text if is_complete else turn.row
            held = [other for other in turns if row.startswith(other.row[: other.end])]
            turns = [other for other in turns if other not in held]
            spans = [span for other in reversed(held) for span in other.spans]
            weights = [other.weight for other in reversed(held) for _ in other.spans]
            rendering = _render_spans(row, spans, weights)
            check_others(messages if is_complete else messages[: turn.last + 1], tools, rendering)
            renderings.append(rendering)
        return renderings[::-1]

    def _find_turn(self, messages: list[Message], number: int, tools: Tools, rendered: tuple[str, list[Span]]) -> _Turn:
        """Return the turn of the answer in message `number`. `rendered`: text and marks up to it."""
        text, marks = rendered
        marked = self._format.marked
        first, start = self._find_start(messages, number, tools, text)
        marks = [mark for mark in marks if mark[1] > start]
        if marked and not marks:
            raise RowError("not marked by the template", f"message {number + 1}, an answer")
        window = text[max(0, start - self._format.header) :]
        for answer in messages[first : number + 1]:
            check_answer(answer, window)
        calls = bool(messages[number].get("tool_calls"))
        ending = self._format.call_ending if calls else self._format.ending
        if calls and ending is None and self._format.ending is not None:
            raise RowError("tool call lost by the template", "it doesn't write calls, or nothing that ends them")
        if ending is None or not text.endswith(ending.written):
            kind = "end token not marked by the template" if marked else "end token not found"
            raise RowError(kind, f"message {number + 1} ends with {text[start:][-40:]!r}")
        end = len(text) - len(ending.written) + ending.produced
        row = text
        if ending.following:
            row += self._next_token(messages, number, tools, text) or ending.following
            end = len(row)
        if end <= start:
            raise RowError("nothing to train", f"message {number + 1} is completely in the generation prompt")
        end_token = row[len(text) : end] or ending.written[: ending.produced].strip()
        _check_single_end(messages[first : number + 1], row[start:end], end_token)
        spans = [(start, end)]
        if marked:
            spans = [(max(start, mark[0]), min(end, mark[1])) for mark in marks if mark[0] < end]
            spans = [span for span in spans if span[0] < span[1]]
            if not spans or spans[-1][1] < end:
                raise RowError("end token not marked by the template", f"{text[end - 20 : end]!r} is not trained")
            if len(spans) == 1:
                window = text[max(0, spans[0][0] - self._format.header) : end]
                check_answer(messages[number], window, last_part=True)
        return _Turn(first, number, row, end, spans, weight_of(messages[number]))

    def _next_token(self, messages: list[Message], number: int, tools: Tools, text: str) -> str:
        """Return the control token that begins the message after `number`, if it leaves `text` unchanged, or ""."""
        if number + 1 == len(messages):
            return ""
        longer, _ = self._format.render(messages[: number + 2], tools)
        token = self._format.special.match(longer, len(text)) if longer.startswith(text) else None
        return token[0] if token else ""

    def _find_start(self, messages: list[Message], number: int, tools: Tools, text: str) -> tuple[int, int]:
        """Return the first message of the turn of answer `number`, and where in `text` the model begins to write it."""
        run = number
        while run and messages[run - 1]["role"] == "assistant":
            run -= 1
        reason = ""
        for first in dict.fromkeys((number, run)):
            for mode in self._format.modes():
                try:
                    prompt, _ = self._format.render(messages[:first], tools, add_generation_prompt=True, **mode)
                except RowError as error:
                    reason = reason or f"the template can't prompt for message {number + 1} ({error.detail})"
                    continue
                if text.startswith(prompt):
                    return first, len(prompt)
                reason = reason or _describe_difference(prompt, text)
        raise RowError(_NO_PROMPT, reason)

    def _check_template(self) -> None:
        """Raise UserError if neither a plain question and answer nor one with reasoning can be trained."""
        text = self._format.try_render(question(ANSWER))
        if text is None or ANSWER not in text:
            return  # a template of a special kind: its rows decide
        if self._format.ending is None:
            after = text.partition(ANSWER)[2]
            raise UserError(
                f"chat.template: after an answer {self._format.name} writes {after!r}, which holds no control token of "
                "the tokenizer, so a model trained with it would never stop. Name a template that ends answers with "
                f"{self._format.eos or 'an end token'}."
            )
        refusal: RowError | None = None
        for messages in probe_conversations():
            try:
                tools = tools_for(messages)
                self._find_turn(messages, len(messages) - 1, tools, self._format.render(messages, tools))
            except RowError as error:
                refusal = error if error.kind == _NO_PROMPT or refusal is None else refusal
            else:
                return
        if refusal is not None and refusal.kind == _NO_PROMPT:
            raise UserError(
                f"chat.template: {self._format.name} can't be trained: {show_sentinels(refusal.detail)}. Name a "
                "template whose answers begin where its generation prompt ends."
            )

    def _marks_agree(self, messages: list[Message]) -> bool:
        """Return whether marks and prompts give the same rows or the same error, or the marks give no row.

        Where the marks give no row, `_rows` uses the prompts.
        """
        targets = _answers(messages)
        tools = tools_for(messages)
        results: list[Any] = []
        for find in (self._by_marks, self._by_prompts):
            try:
                results.append(find(messages, targets, tools, *self._format.render(messages, tools)))
            except RowError as error:
                results.append(error.kind)
        return results[0] in ([], results[1])


def _render_spans(text: str, spans: list[Span], weights: list[float]) -> Rendering:
    return Rendering(text, spans, weights if any(weight != 1 for weight in weights) else ())


def _has_tools(messages: list[Message], tools: Tools) -> bool:
    return bool(tools) or any(message["role"] == "tool" or message.get("tool_calls") for message in messages)


def _answers(messages: list[Message]) -> list[int]:
    return [number for number, message in enumerate(messages) if message["role"] == "assistant"]


def _check_single_end(answers: list[Message], written: str, end_token: str) -> None:
    """Raise RowError if text follows an end token: the template writes it, not the model.

    End tokens in an answer's own text (`control_tokens_in_text: allow`) and between merged answers don't count.
    """
    own = sum(str(value).count(end_token) for answer in answers for value in answer.values())
    if written.count(end_token) > own + len(answers):
        raise RowError("text after the end of an answer", f"{end_token} is within {written[:80]!r}")


def _describe_difference(prompt: str, text: str) -> str:
    """Describe where the generation prompt and the conversation diverge."""
    same = next((at for at, pair in enumerate(zip(prompt, text, strict=False)) if pair[0] != pair[1]), len(text))
    in_prompt, in_text = (show_sentinels(rest[same : same + 60])[:40] for rest in (prompt, text))
    return f"its generation prompt continues with {in_prompt!r} where the conversation continues with {in_text!r}"
