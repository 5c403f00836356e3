"""Probe of a chat template's system messages, by rendering sentinels and never by reading the template."""

import re
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from train.data.chat.rendering import describe_exception
from train.data.chat.template import template_name
from train.errors import UserError

Handling = Literal["turn", "merged", "ignored", "raises"]
Middle = Literal["turn", "merged", "moved", "ignored", "raises"]
Messages = list[dict[str, Any]]

SYSTEM, OTHER_SYSTEM, QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER = (
    f"\ue000{word}\ue001" for word in ("system", "other", "question", "answer", "next question", "next answer")
)
"""Sentinels between private-use characters: no template writes them, and no default begins or ends with them."""
EXCHANGES: Messages = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": NEXT_QUESTION},
    {"role": "assistant", "content": NEXT_ANSWER},
]
"""Two questions and answers, without a system message."""

_TURN_NAMES = ("the first question", "the first answer", "the second question", "the second answer")
_DIGIT = re.compile(r"\d")
_CONTROL = re.compile(r"<[|｜]?[^<>\s]+[|｜]?>|\[/?\w+\]")
_ROLE_WORD = re.compile(r"\b(?:system|developer)\b", re.IGNORECASE)


class Refused(Exception):  # noqa: N818 - a result of probing, not an error of the program
    """The template raised an exception, whose text this holds."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A template's handling of system messages.

    - `handling`: a system message at the start is a turn of its own, is merged into a user turn (`merged_into`: which
      one of several), is ignored, or makes the template raise (`refusal`: its text).
    - `default`: text that the template writes in place of a missing system message.
    - `header`: text that it writes before the first user turn of every conversation, such as Llama 3.1's dates.
    - `dated`: the render depends on today's date.
    - `mid_conversation`: the same for a system message between two exchanges; moved: to the front.
    - `two_in_a_row`: both are kept, or one is lost.
    - `empty`: an empty one renders as none does, or differs.
    - `contents_are_parts`: the template renders contents that are lists of parts and loses plain texts.
    """

    handling: Handling
    refusal: str | None
    merged_into: Literal["first", "last"] | None
    default: str | None
    header: str | None
    dated: bool
    mid_conversation: Middle
    two_in_a_row: Literal["kept", "lost", "raises"]
    empty: Literal["absent", "differs", "raises"]
    contents_are_parts: bool

    def describe(self) -> list[str]:
        """Return sentences about the template as it is, the most important first."""
        handling = {
            "turn": "writes a system message as a turn of its own",
            "merged": f"writes a system message into the {self.merged_into} user turn",
            "ignored": "IGNORES system messages: their text is not in the render",
            "raises": f"refuses system messages: {self.refusal}",
        }[self.handling]
        sentences = [f"The unmodified template {handling}."]
        if self.default is not None:
            sentences.append(f"To a conversation without one it adds its own: {self.default!r}.")
        if self.contents_are_parts:
            sentences.append("It renders contents that are lists of parts only, and loses contents that are text.")
        return sentences

    def describe_training(self) -> list[str]:
        """Return sentences about the positions of system messages in training rows."""
        sentences = [
            {
                "turn": "A system message is a turn of its own.",
                "merged": f"A system message goes into the {self.merged_into} user turn.",
                "ignored": "A system message is LOST.",
                "raises": "A conversation with a system message is refused.",
            }[self.handling]
        ]
        if self.merged_into == "last":
            sentences.append("So the earlier answers of a conversation are trained without it.")
        if self.handling in ("turn", "merged"):
            sentences.append(
                {
                    "turn": "One in the middle of a conversation is a turn there.",
                    "merged": "One in the middle of a conversation goes into a user turn.",
                    "moved": "One in the middle of a conversation is moved to the front.",
                    "ignored": "One in the middle of a conversation is LOST.",
                    "raises": "One in the middle of a conversation is refused.",
                }[self.mid_conversation]
            )
            if self.two_in_a_row == "lost":
                sentences.append("Of two in a row one is LOST.")
            elif self.two_in_a_row == "raises":
                sentences.append("Two in a row are refused.")
        return sentences


@dataclass(frozen=True, slots=True)
class Turns:
    """A template's turns in a conversation without a system message.

    - `plain`: the render of `EXCHANGES`.
    - `bos`: the BOS token that it begins with, or "".
    - `head`: the other text before the first user turn.
    - `opening`: the text before a user's text, the same in all turns.
    - `in_parts`: the template takes contents as lists of parts.
    """

    plain: str
    bos: str
    head: str
    opening: str
    in_parts: bool


def system(text: str = SYSTEM) -> Messages:
    """Return a conversation of one system message."""
    return [{"role": "system", "content": text}]


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    *,
    template: str | None = None,
    in_parts: bool = False,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation under the tokenizer's template or another. Raises Refused."""
    if in_parts:
        messages = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
    try:
        texts, _ = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=tokenizer.chat_template if template is None else template,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except Exception as error:  # a template is a program: it can fail in any way
        raise Refused(describe_exception(error)) from error
    return str(texts[0])


def probe(tokenizer: PreTrainedTokenizerBase) -> Probe:
    """Probe how the tokenizer's template handles system messages.

    Raises UserError if the template can't render two questions and answers without one.
    """
    turns = find_turns(tokenizer)

    def attempt(messages: Messages) -> str | Refused:
        try:
            return render_text(tokenizer, messages, in_parts=turns.in_parts)
        except Refused as refused:
            return refused

    text = attempt(system() + EXCHANGES)
    pair = attempt(system() + system(OTHER_SYSTEM) + EXCHANGES)
    empty = attempt(system("") + EXCHANGES)
    handling, merged_into = _handling(text, turns)
    kept = isinstance(text, str) and handling != "ignored"
    default = _injected(turns.plain, str(text)) if kept else None
    return Probe(
        handling=handling,
        refusal=str(text) if isinstance(text, Refused) else None,
        merged_into=merged_into,
        default=default,
        header=_strip_control_tokens(turns.head.replace(default, "", 1) if default else turns.head),
        dated="strftime_now" in str(tokenizer.chat_template),
        mid_conversation=_middle(attempt(EXCHANGES[:2] + system() + EXCHANGES[2:]), turns),
        two_in_a_row=_pair(pair),
        empty="raises"
        if isinstance(empty, Refused)
        else "absent"
        if _mask_digits(empty) == _mask_digits(turns.plain)
        else "differs",
        contents_are_parts=turns.in_parts,
    )


def find_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """Probe how the tokenizer's template writes turns. Raises UserError if it loses one of a plain conversation."""
    refusal: str | None = None
    lost: list[str] = []
    for in_parts in (False, True):
        try:
            plain = render_text(tokenizer, EXCHANGES, in_parts=in_parts)
            after_answer = render_text(tokenizer, EXCHANGES[:2], in_parts=in_parts).rpartition(ANSWER)[2]
        except Refused as refused:
            refusal = refusal or str(refused)
            continue
        missing = [name for name, turn in zip(_TURN_NAMES, EXCHANGES, strict=True) if turn["content"] not in plain]
        if not missing:
            break
        lost = lost or missing
    else:
        verb, reason = ("refuses", refusal) if refusal else ("loses messages of", f"{', '.join(lost)}: not as written")
        raise UserError(
            f"chat.template: {template_name(tokenizer)} {verb} a conversation of two questions and answers ({reason}). "
            "Name another template."
        )
    before, _, rest = plain.partition(QUESTION)
    between = rest.partition(ANSWER)[2].partition(NEXT_QUESTION)[0]
    opening = between.removeprefix(after_answer)
    bos = tokenizer.bos_token or ""
    if not before.startswith(bos) or opening.startswith(bos):
        bos = ""  # also if it begins every turn, as SmolLM2's does
    before = before.removeprefix(bos)
    shared = common_end(_mask_digits(before), _mask_digits(opening))
    if not shared.strip() and opening.strip():  # a default in the first user turn, after its opening
        head = before[: max(0, _mask_digits(before).rfind(_mask_digits(opening)))]
    else:
        head = before[: len(before) - len(shared)]
        opening = before[len(head) :]
    return Turns(plain, bos, head, opening, in_parts)


def common_end(first: str, second: str) -> str:
    """Return the longest text that both end with."""
    return first[len(first) - _common_length(first[::-1], second[::-1]) :]


def _mask_digits(text: str) -> str:
    """Return `text` with all digits as 0, so that numbered turns and clocks compare equal."""
    return _DIGIT.sub("0", text)


def _common_length(first: str, second: str) -> int:
    """Return the length of the longest text that both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _handling(text: str | Refused, turns: Turns) -> tuple[Handling, Literal["first", "last"] | None]:
    """Return how a system message before `EXCHANGES` was handled."""
    if isinstance(text, Refused):
        return "raises", None
    if SYSTEM not in text:
        return "ignored", None
    before, _, after = text.partition(SYSTEM)
    if QUESTION in after and _opens_turn(after.partition(QUESTION)[0], turns):
        return "turn", None
    return "merged", "last" if QUESTION in before and ANSWER in before else "first"


def _middle(text: str | Refused, turns: Turns) -> Middle:
    """Return how a system message between the two of `EXCHANGES` was handled."""
    if isinstance(text, Refused):
        return "raises"
    if SYSTEM not in text:
        return "ignored"
    before, _, after = text.partition(SYSTEM)
    if QUESTION not in before:
        return "moved"
    return "turn" if _opens_turn(after.partition(NEXT_QUESTION)[0], turns) else "merged"


def _pair(text: str | Refused) -> Literal["kept", "lost", "raises"]:
    """Return how two system messages at the start were handled."""
    if isinstance(text, Refused):
        return "raises"
    return "kept" if SYSTEM in text and OTHER_SYSTEM in text else "lost"


def _opens_turn(gap: str, turns: Turns) -> bool:
    """Return whether a user turn begins in the text between a system message and a user's text."""
    return _mask_digits(turns.opening).strip() in _mask_digits(gap)


def _injected(plain: str, with_system: str) -> str | None:
    """Return the text in place of the system message in the render without one, or None.

    It lies between two messages, or before the first one: a difference elsewhere is not a default.
    """
    before, _, after = with_system.partition(SYSTEM)
    behind = next((end for end in (QUESTION, ANSWER, NEXT_QUESTION, NEXT_ANSWER) if end in after), None)
    front = next((end for end in (NEXT_ANSWER, NEXT_QUESTION, ANSWER, QUESTION) if end in before), None)
    gap = plain.partition(behind)[0] if behind else plain
    gap = gap.rpartition(front)[2] if front else gap
    given = before.rpartition(front)[2] if front else before
    given += SYSTEM + (after.partition(behind)[0] if behind else after)
    start = _common_length(_mask_digits(gap), _mask_digits(given))
    end = len(gap) - len(common_end(_mask_digits(gap[start:]), _mask_digits(given[start:])))
    return gap[start:end].strip() or None


def _strip_control_tokens(head: str) -> str | None:
    """Return the text of `head` without control tokens and the name of the role, or None."""
    text = _CONTROL.sub("\n", head).strip()
    if not re.search(r"\w", _ROLE_WORD.sub("", text)):
        return None
    return _ROLE_WORD.sub("", text, count=1).strip() if _ROLE_WORD.match(text) else text
