"""The answer in what a model wrote: without the reasoning before it and the control tokens around it.

A server with a parser for reasoning (vLLM's --reasoning-parser) sends it beside the content, and nothing is to be done.
One without leaves it in, in one of many forms (reasoning_forms.py, harmony.py). None of it belongs to the message, the
verdict or the new answer. Every command that asks a model reads its answers by `read_answer`.

    <think>Hm, Bern.</think>Bern.<|im_end|>   Bern.        a control token was left at the end
    Hm, Bern.</think>Bern.                    Bern.        the chat template has put the opener into the prompt
    <think>Hm, Bern or                        unfinished   no answer: never trained on, never scored in silence
    Models end it with </think> and then ...  unchanged    the answer speaks of the tag (`holds_reasoning`)
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from train.llm.control_tokens import (
    cut_at_next_turn,
    holds_control_tokens,
    without_code,
    without_end_tokens,
    without_header,
)
from train.llm.harmony import holds_harmony, split_channels
from train.llm.journal import Answer
from train.llm.reasoning_forms import OPENER, TAG, Form, closers_alone, form_of, holds_token, may_hold_marks
from train.progress import counted

_CLOSING_FENCE = re.compile(r"\s*```[^\S\n]*(?:\n|\Z)")
_WRAPPED = re.compile(
    r"\s*<(?P<name>answer|response|output|solution)>(?P<answer>(?:(?!</(?P=name)>).)*)(?:</(?P=name)>\s*)?\Z",
    re.DOTALL | re.IGNORECASE,
)
"""Tags around the answer after the reasoning: Hunyuan, Granite 3.3, ERNIE, Marco-o1."""
_QUOTES = "\"'“”‘’«»("
_SENTENCE_END = '.!?…。！？:)]}>*"”’'


@dataclass(frozen=True, slots=True)
class Said:
    """What a model wrote, in its parts.

    `unfinished`: the reasoning never ended, or can't be told from the answer; `text` is then empty. `end_tokens`:
    control tokens that were taken off the answer. `ran_on`: the model went on with further turns, which were cut off.
    """

    text: str
    reasoning: str | None = None
    unfinished: bool = False
    end_tokens: tuple[str, ...] = ()
    ran_on: bool = False

    @property
    def holds_reasoning(self) -> bool:
        """Return True where marks of reasoning are left in the text: an answer may speak of them, so they stay."""
        text = self.text
        return bool(("<" in text and TAG.search(text)) or "[THINK]" in text or "[/THINK]" in text or holds_token(text))

    @property
    def holds_control_tokens(self) -> bool:
        """Return True where control tokens of some model are left in the text."""
        return holds_control_tokens(self.text)


NO_END = "reasoning without an end, and nothing said"
TAKEN_OUT = "reasoning taken out"
END_TOKENS = "control tokens taken off the end"
RAN_ON = "ran on after its end, and was cut there"
TAGS_LEFT = "tags of reasoning left in the text"
TOKENS_LEFT = "control tokens left in the text"
LEFT = (TAGS_LEFT, TOKENS_LEFT)

ADVICE = {
    NO_END: "raise the token limit, or start the server with a parser for this model's reasoning",
    END_TOKENS: "the server does not know this model's end token: look at its chat template and its stop tokens",
    RAN_ON: "the server does not know this model's end token: look at its chat template and its stop tokens",
    TAGS_LEFT: "the text may speak of them, or hold reasoning: read some before you use it",
    TOKENS_LEFT: "train/sft.py --check refuses them for a tokenizer that has them",
}
"""What a user has to know beyond the report."""


def events_of(said: Said) -> list[str]:
    """Return what was taken out of a text and what is left in it, in the words of the reports."""
    happened = {
        NO_END: said.unfinished,
        TAKEN_OUT: said.reasoning is not None and not said.unfinished,
        END_TOKENS: bool(said.end_tokens),
        RAN_ON: said.ran_on,
        TAGS_LEFT: said.holds_reasoning,
        TOKENS_LEFT: said.holds_control_tokens,
    }
    return [words for words, is_so in happened.items() if is_so]


def advice_on(events: Mapping[str, int]) -> list[str]:
    """Return a line for each kind of event that a user has to know of. Names of events: `stage: words`."""
    lines = []
    for words, advice in ADVICE.items():
        stages = {event.removesuffix(f": {words}"): count for event, count in events.items() if event.endswith(words)}
        if total := sum(stages.values()):
            of = ", ".join(f"{stage} {count:,}" for stage, count in stages.items() if count)
            lines.append(f"{words}: {counted(total, 'answer')} ({of}); {advice}")
    return lines


def read_answer(answer: Answer) -> tuple[Answer, Said]:
    """Return the answer as it is to be read, and what was taken out of it.

    One that ran on after its end token came to its own end, even if the token limit ended the rest.
    """
    said = without_reasoning(answer.text)
    if said.text is answer.text and not said.unfinished:
        return answer, said
    finish_reason = "stop" if said.ran_on and answer.cut else answer.finish_reason
    return replace(answer, text=said.text, only_reasoning=said.unfinished, finish_reason=finish_reason), said


def without_reasoning(text: str) -> Said:
    """Return `text` without the reasoning and the control tokens around the answer. Never raises."""
    if OPENER.match(text) is None and not may_hold_marks(text):
        return Said(text)
    whole, *headers = without_header(text)
    said = _split(whole)
    if said.unfinished:
        return said
    answer, tokens = without_end_tokens(said.text)
    if said.reasoning is not None:
        answer, mark = without_header(answer)
        headers.append(mark)
    if holds_token(without_code(answer)) or holds_harmony(without_code(answer)):
        return Said("", text, unfinished=True)  # reasoning may stand anywhere in it
    if said.reasoning is not None and (wrapped := _WRAPPED.match(answer)):
        answer = wrapped["answer"].strip()
    return replace(said, text=answer, end_tokens=(*tokens, *filter(None, headers)))


def _split(text: str) -> Said:
    """Return the parts of a text, with whatever control tokens are left at the end of the answer."""
    plain = without_code(text)
    if holds_harmony(plain):
        if (channels := split_channels(text, plain)) is None:
            return Said("", text, unfinished=True)
        reasoning, answer, rest = channels
        return Said(answer.strip(), reasoning or None, ran_on=bool(without_end_tokens(rest)[0].strip()))
    opener = OPENER.match(text)
    rest, ran_on = (text, False) if opener and form_of(opener).holds_turn else cut_at_next_turn(text)
    thoughts: list[str] = []
    while True:
        if opener := OPENER.match(rest):
            form = form_of(opener)
            end = _closer_of(rest, opener, form)
            if end is None and not form.needs_closer:
                return Said("", "\n".join([*thoughts, rest[opener.end() :].strip()]), unfinished=True)
            if end and opener["fence"]:
                fence = _CLOSING_FENCE.match(rest, end[1])
                end = (end[0], fence.end()) if fence and rest[fence.end() :].strip() else None  # else shown as code
            start = opener.end()
        else:
            end, start = None if thoughts else _closer_alone(rest), 0
        if end is None:
            break
        thoughts.append(rest[start : end[0]].strip())
        rest = rest[end[1] :]
    if not thoughts:
        return Said(rest, ran_on=ran_on)
    return Said(rest.lstrip(), "\n".join(thoughts), ran_on=ran_on)


def _closer_of(text: str, opener: re.Match[str], form: Form) -> tuple[int, int] | None:
    """Return where the closer of an opener begins and ends; None where it has none."""
    found = form.find_closer(without_code(text), opener)
    if found is None and not form.needs_closer:  # a lone backtick in the reasoning, or the whole in a code block
        found = form.find_closer(text, opener)
    if found is None:
        return None
    end = found.end()
    if form.find_opener(without_code(text[opener.end() : found.start()])) is not None:  # reasoning that speaks of tags
        inner = _closer_alone(text[end:])
        if inner:
            return end + inner[0], end + inner[1]
    return found.span()


def _closer_alone(text: str) -> tuple[int, int] | None:
    """Return where a closer without an opener begins and ends; None where nothing ends reasoning for certain."""
    plain = without_code(text)
    opened: dict[str, int | None] = {}
    for form, closer in closers_alone(plain):
        if form.models not in opened:
            opened[form.models] = form.find_opener(plain)
        first = opened[form.models]
        if first is not None and first < closer.start():
            return None  # the answer shows or speaks of both
        before, after = plain[: closer.start()], plain[closer.end() :]
        match form.alone:
            case "word":
                ends = _ends_reasoning(before, after)
            case "glued":
                ends = not (before[-1:].isspace() or after[:1].isspace()) and bool(before and after)
            case _:
                ends = True
        if ends:
            return closer.span()
    return None


def _ends_reasoning(before: str, after: str) -> bool:
    """Return True where a tag between these texts ends reasoning. In prose about the tag, it is a word of its own."""
    if not before.strip():
        return True
    glued = not before[-1].isspace()
    if not after.strip():
        return glued or before.rstrip()[-1] in _SENTENCE_END
    if after.lstrip(" \t")[0] == "\n":
        return True
    if after[0] in ",;:.?!)" or (before[-1] in _QUOTES and after[0] in _QUOTES):
        return False
    ended = before.rstrip()[-1] in _SENTENCE_END or before.rstrip(" \t")[-1:] == "\n"
    first = after.lstrip()[0]
    return glued or (ended and not first.islower()) or not (after[0].isspace() or first.islower())
