"""The answer in what a model wrote: without the reasoning before it and the control tokens around it.

A server with a parser for reasoning (vLLM's --reasoning-parser) sends it beside the content, and nothing is to be done.
One without leaves it in, in one of many forms (reasoning_forms.py, harmony.py). None of it belongs to the message, the
verdict or the new answer. Every command that asks a model reads its answers by `read_answer`.

    <think>Hm, Bern.</think>Bern.<|im_end|>   Bern.        a control token was left at the end
    Hm, Bern.</think>Bern.                    Bern.        the chat template has put the opener into the prompt
    <think>Hm, Bern or                        unfinished   no answer: never trained on, never scored in silence
    Models end it with </think> and then ...  unchanged    the answer speaks of the tag (`holds_reasoning`)

Reasoning that is certain is taken out. Where a mark may be content the text stays whole, and is counted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.formatting import format_count
from train.llm.journal import Answer
from train.llm.reasoning.block_ends import closer_alone, closer_of, strip_blocks
from train.llm.reasoning.code_spans import blank_code
from train.llm.reasoning.control_tokens import (
    cut_at_next_turn,
    holds_control_tokens,
    holds_turns,
    strip_end_tokens,
    strip_header,
)
from train.llm.reasoning.forms import CLOSER, OPENER, TAG, document_name, form_of, may_hold_marks, tokens_in
from train.llm.reasoning.harmony import holds_harmony, split_channels
from train.llm.reasoning.mentions import is_announced, is_named, is_word
from train.llm.reasoning.tool_calls import calls_tool

_CLOSING_FENCE = re.compile(r"\s*```[^\S\n]*(?:\n|\Z)")
_WRAPPED = re.compile(
    r"\s*<(?P<name>answer|response|output|solution)>(?P<answer>(?:(?!</(?P=name)>).)*)(?:</(?P=name)>\s*)?\Z",
    re.DOTALL | re.IGNORECASE,
)
"""Tags around the answer after the reasoning: Hunyuan, Granite 3.3, ERNIE, Marco-o1."""
_NEXT_CHANNEL = re.compile(r"(?<=\S)assistant(?:analysis|commentary|final)")
_NEXT_TAG = re.compile(r"\s*<(?!(?:answer|response|output|solution)\b)[a-z]\w*\b[^<>|]*>", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ParsedReply:
    """A model's reply, in its parts.

    `unfinished`: the reasoning never ended, or can't be told from the answer; `text` is then empty. `end_tokens`:
    control tokens that were taken off the answer. `ran_on`: the model went on with further turns, which were cut off.
    `calls_tool`: the text is a call of a tool. `is_plain`: nothing in it looks like a mark or a token.
    """

    text: str
    reasoning: str | None = None
    unfinished: bool = False
    end_tokens: tuple[str, ...] = ()
    ran_on: bool = False
    calls_tool: bool = False
    is_plain: bool = False

    @property
    def holds_reasoning(self) -> bool:
        """Return True where marks of reasoning are left in the text: an answer may speak of them, so they stay."""
        text = self.text
        return not self.is_plain and bool(
            ("<" in text and TAG.search(text))
            or ("THINK" in text and ("[THINK]" in text or "[/THINK]" in text))
            or ("REASONING]" in text and ("[REASONING]" in text or "[/REASONING]" in text))
            or any(tokens_in(text))
        )

    @property
    def holds_control_tokens(self) -> bool:
        """Return True where control tokens of some model are left in the text."""
        return not self.is_plain and holds_control_tokens(self.text)


NO_END = "reasoning without an end, and nothing said"
TAKEN_OUT = "reasoning taken out"
END_TOKENS = "control tokens taken off the end"
RAN_ON = "ran on after its end, and was cut there"
TAGS_LEFT = "tags of reasoning left in the text"
TOKENS_LEFT = "control tokens left in the text"
TURNS_LEFT = "lines that look like further turns"
LEFTOVER_EVENTS = (TAGS_LEFT, TOKENS_LEFT, TURNS_LEFT)

ADVICE = {
    NO_END: "raise the token limit, or start the server with a parser for this model's reasoning",
    END_TOKENS: "the server does not know this model's end token: look at its chat template and its stop tokens",
    RAN_ON: "the server does not know this model's end token: look at its chat template and its stop tokens",
    TAGS_LEFT: "the text may speak of them, or hold reasoning: read some before you use it",
    TOKENS_LEFT: "train/sft.py --check refuses them for a tokenizer that has them",
    TURNS_LEFT: "the text may be a dialogue, or the model went on past its end: read some before you use it",
}
"""Advice beyond the report, by event."""


def list_events(said: ParsedReply) -> list[str]:
    """Return what was taken out of a text and what is left in it, in the words of the reports."""
    if said.is_plain:  # most answers
        return [TURNS_LEFT] if holds_turns(said.text) else []
    happened = {
        NO_END: said.unfinished,
        TAKEN_OUT: said.reasoning is not None and not said.unfinished,
        END_TOKENS: bool(said.end_tokens),
        RAN_ON: said.ran_on,
        TAGS_LEFT: said.holds_reasoning,
        TOKENS_LEFT: said.holds_control_tokens,
        TURNS_LEFT: holds_turns(said.text),
    }
    return [words for words, is_so in happened.items() if is_so]


def format_advice(events: Mapping[str, int]) -> list[str]:
    """Return a line for each kind of event that a user has to know of. Names of events: `stage: words`."""
    lines = []
    for words, advice in ADVICE.items():
        stages = {event.removesuffix(f": {words}"): count for event, count in events.items() if event.endswith(words)}
        if total := sum(stages.values()):
            of = ", ".join(f"{stage} {count:,}" for stage, count in stages.items() if count)
            lines.append(f"{words}: {format_count(total, 'answer')} ({of}); {advice}")
    return lines


def read_answer(answer: Answer, asked: Sequence[Mapping[str, Any]] = ()) -> tuple[Answer, ParsedReply]:
    """Return the answer as it is to be read, and what was taken out of it.

    One that ran on after its end token came to its own end, even if the token limit ended the rest. One whose text is
    a call of a tool ended as that, whatever the server says. `asked`: the messages that it answers.
    """
    said = without_reasoning(answer.text, asked)
    if said.text is answer.text and not (said.unfinished or said.calls_tool):
        return answer, said
    finish_reason = answer.finish_reason
    if said.ran_on and answer.cut:
        finish_reason = "stop"
    elif said.calls_tool and answer.ending in ("complete", "unstated"):
        finish_reason = "tool_calls"
    return replace(answer, text=said.text, only_reasoning=said.unfinished, finish_reason=finish_reason), said


def without_reasoning(text: str, asked: Sequence[Mapping[str, Any]] = ()) -> ParsedReply:
    """Return `text` without the reasoning and the control tokens around the answer. Never raises.

    `asked`: the messages that it answers. A tag of an ordinary name (<reasoning>) that they hold was asked for.
    """
    if OPENER.match(text) is None and not may_hold_marks(text):
        return ParsedReply(text, is_plain=True)
    whole, headers = strip_header(text)
    said = _split(whole, asked)
    if said.unfinished:
        return said
    answer, tokens = strip_end_tokens(said.text)
    if said.reasoning is not None:
        answer, marks = strip_header(answer)
        headers += marks
        if wrapped := _WRAPPED.match(answer):
            answer = wrapped["answer"].strip()
    plain = blank_code(answer)
    if holds_harmony(plain) or any(_is_real(answer, token) for token in tokens_in(plain)):
        return ParsedReply("", text, unfinished=True)  # reasoning may stand anywhere in it
    return replace(said, text=answer, end_tokens=(*tokens, *headers), calls_tool=calls_tool(answer, plain))


def _is_real(text: str, token: re.Match[str]) -> bool:
    """Return True where a token of reasoning was set by the model, and is no word of the text."""
    start, end = token.span()
    return not (is_word(text, start, end) or is_named(text, start, end) or is_announced(text, start))


def _split(text: str, asked: Sequence[Mapping[str, Any]]) -> ParsedReply:
    """Return the parts of a text, with whatever control tokens are left at the end of the answer."""
    plain = blank_code(text)
    if holds_harmony(plain):
        if (channels := split_channels(text, plain)) is None:
            return ParsedReply("", text, unfinished=True)
        reasoning, answer, rest = channels
        return ParsedReply(answer.strip(), reasoning or None, ran_on=bool(strip_end_tokens(rest)[0].strip()))
    opener = OPENER.match(text)
    rest, ran_on = (text, False) if opener and form_of(opener).holds_turn else cut_at_next_turn(text)
    thoughts: list[str] = []
    while True:
        if opener := OPENER.match(rest):
            form, start = form_of(opener), opener.end()
            is_named_here = not form.needs_closer and is_named(rest, start, start)
            end = closer_of(rest, opener, form, must_be_clear=is_named_here)
            if end is None and not (form.needs_closer or is_named_here):
                return ParsedReply("", "\n".join([*thoughts, rest[start:].strip()]), unfinished=True)
            if end and opener["fence"]:
                fence = _CLOSING_FENCE.match(rest, end[1])
                end = (end[0], fence.end()) if fence and rest[fence.end() :].strip() else None  # else shown as code
            name = document_name(opener, form)
            if end and name and _is_document(name, rest[end[1] :], asked):
                end = None
        else:
            again = CLOSER.match(rest) if thoughts else None
            start, end = 0, again.span() if again else None if thoughts else closer_alone(rest)
        if end is None:
            break
        thoughts.append(rest[start : end[0]].strip())
        is_channel = rest[: end[1]].endswith("assistantfinal")
        rest = rest[end[1] :].lstrip()
        if is_channel and (following := _NEXT_CHANNEL.search(rest)):
            rest, ran_on = rest[: following.start()].rstrip(), True
    answer, blocks, is_open = strip_blocks(rest)
    thoughts += blocks
    if is_open:
        return ParsedReply("", "\n".join([*thoughts, answer]), unfinished=True)
    return ParsedReply(answer, "\n".join(thoughts) if thoughts else None, ran_on=ran_on)


def _is_document(name: str, rest: str, asked: Sequence[Mapping[str, Any]]) -> bool:
    """Return True where tags of a name that any document may have are part of the answer: nothing follows them, or
    other tags do, or the question names them.
    """
    if not strip_end_tokens(rest)[0].strip() or (_NEXT_TAG.match(rest) and not OPENER.match(rest)):
        return True
    return any(f"<{name}".casefold() in str(message.get("content")).casefold() for message in asked)
