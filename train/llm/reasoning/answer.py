"""The answer in a model's reply, without the reasoning before it and the control tokens around it.

A server with a parser for reasoning (vLLM's --reasoning-parser) sends it beside the content. Without one, the text
holds it in one of many forms (forms.py, harmony.py). Every command that asks a model reads its answers with
`read_answer`, since reasoning belongs neither to a message nor to a verdict.

    <think>Hm, Bern.</think>Bern.<|im_end|>   Bern.        control token left at the end
    Hm, Bern.</think>Bern.                    Bern.        the chat template put the opener into the prompt
    <think>Hm, Bern or                        unfinished   no answer: never trained on, never scored silently
    Models end it with </think> and then ...  unchanged    the answer speaks of the tag (`holds_reasoning`)

Certain reasoning is removed. If a mark may be content, the text stays unchanged, and is counted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from train.formatting import format_count
from train.llm.reasoning.block_ends import find_closer, find_lone_closer, strip_blocks
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
from train.llm.request import Answer

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
    """The parts of a model's reply.

    text: the answer; empty if `unfinished`.
    unfinished: the reasoning never ended, or can't be separated from the answer.
    end_tokens: control tokens removed from the answer.
    ran_on: the model continued with further turns, which were cut off.
    calls_tool: the text is a tool call.
    is_plain: nothing in it looks like a mark or a token.
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
        """Return True if marks of reasoning remain in the text: an answer may speak of them, so they stay."""
        text = self.text
        return not self.is_plain and bool(
            ("<" in text and TAG.search(text))
            or ("THINK" in text and ("[THINK]" in text or "[/THINK]" in text))
            or ("REASONING]" in text and ("[REASONING]" in text or "[/REASONING]" in text))
            or any(tokens_in(text))
        )

    @property
    def holds_control_tokens(self) -> bool:
        """Return True if control tokens of some model remain in the text."""
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


def list_events(reply: ParsedReply) -> list[str]:
    """Return what was removed from a reply and what remains in it, as the reports name it."""
    if reply.is_plain:  # most answers
        return [TURNS_LEFT] if holds_turns(reply.text) else []
    events = {
        NO_END: reply.unfinished,
        TAKEN_OUT: reply.reasoning is not None and not reply.unfinished,
        END_TOKENS: bool(reply.end_tokens),
        RAN_ON: reply.ran_on,
        TAGS_LEFT: reply.holds_reasoning,
        TOKENS_LEFT: reply.holds_control_tokens,
        TURNS_LEFT: holds_turns(reply.text),
    }
    return [event for event, occurred in events.items() if occurred]


def format_advice(events: Mapping[str, int]) -> list[str]:
    """Return a line of advice for each kind of event that has some. Names of events: `stage: event`."""
    lines = []
    for kind, advice in ADVICE.items():
        stages = {event.removesuffix(f": {kind}"): count for event, count in events.items() if event.endswith(kind)}
        if total := sum(stages.values()):
            counts = ", ".join(f"{stage} {count:,}" for stage, count in stages.items() if count)
            lines.append(f"{kind}: {format_count(total, 'answer')} ({counts}); {advice}")
    return lines


def read_answer(answer: Answer, prompt: Sequence[Mapping[str, Any]] = ()) -> tuple[Answer, ParsedReply]:
    """Return the answer without reasoning and control tokens, and the parts of its reply.

    An answer that ran on after its end token is complete, even if the token limit cut the rest. A text that is a tool
    call gets the finish reason of one. `prompt`: the messages that it answers.
    """
    reply = without_reasoning(answer.text, prompt)
    if reply.text is answer.text and not (reply.unfinished or reply.calls_tool):
        return answer, reply
    finish_reason = answer.finish_reason
    if reply.ran_on and answer.cut:
        finish_reason = "stop"
    elif reply.calls_tool and answer.finish_class in ("complete", "unstated"):
        finish_reason = "tool_calls"
    return replace(answer, text=reply.text, only_reasoning=reply.unfinished, finish_reason=finish_reason), reply


def without_reasoning(text: str, prompt: Sequence[Mapping[str, Any]] = ()) -> ParsedReply:
    """Return the parts of a reply: the answer, the reasoning, the control tokens. Never raises.

    `prompt`: the messages that it answers. A tag with an ordinary name (<reasoning>) in them was asked for, and stays.
    """
    if OPENER.match(text) is None and not may_hold_marks(text):
        return ParsedReply(text, is_plain=True)
    content, headers = strip_header(text)
    reply = _split(content, prompt)
    if reply.unfinished:
        return reply
    answer, tokens = strip_end_tokens(reply.text)
    if reply.reasoning is not None:
        answer, marks = strip_header(answer)
        headers += marks
        if wrapped := _WRAPPED.match(answer):
            answer = wrapped["answer"].strip()
    plain = blank_code(answer)
    if holds_harmony(plain) or any(_is_real(answer, token) for token in tokens_in(plain)):
        return ParsedReply("", text, unfinished=True)  # reasoning may stand anywhere in it
    return replace(reply, text=answer, end_tokens=(*tokens, *headers), calls_tool=calls_tool(answer, plain))


def _is_real(text: str, token: re.Match[str]) -> bool:
    """Return True if a token of reasoning is a mark of the model, not a word of the text."""
    start, end = token.span()
    return not (is_word(text, start, end) or is_named(text, start, end) or is_announced(text, start))


def _split(text: str, prompt: Sequence[Mapping[str, Any]]) -> ParsedReply:
    """Return the parts of a text; control tokens may remain at the end of the answer."""
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
            is_ambiguous = not form.needs_closer and is_named(rest, start, start)
            end = find_closer(rest, opener, form, must_be_clear=is_ambiguous)
            if end is None and not (form.needs_closer or is_ambiguous):
                return ParsedReply("", "\n".join([*thoughts, rest[start:].strip()]), unfinished=True)
            if end and opener["fence"]:
                fence = _CLOSING_FENCE.match(rest, end[1])  # without one, or with no text after it, it is shown as code
                end = (end[0], fence.end()) if fence and rest[fence.end() :].strip() else None
            name = document_name(opener, form)
            if end and name and _is_part_of_answer(name, rest[end[1] :], prompt):
                end = None
        else:
            again = CLOSER.match(rest) if thoughts else None
            start, end = 0, again.span() if again else None if thoughts else find_lone_closer(rest)
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


def _is_part_of_answer(name: str, rest: str, prompt: Sequence[Mapping[str, Any]]) -> bool:
    """Return True if tags with an ordinary name belong to the answer.

    They do if nothing follows them, if other tags follow, or if the question names them.
    """
    if not strip_end_tokens(rest)[0].strip() or (_NEXT_TAG.match(rest) and not OPENER.match(rest)):
        return True
    return any(f"<{name}".casefold() in str(message.get("content")).casefold() for message in prompt)
