"""Prompts of the collection, and the parsing of their replies.

The wording and the examples are ours. Every prompt consists of user and assistant turns only, since some models have no
system role, and states the task before anything that differs between rows, so that servers with a prefix cache compute
it once. The system message is written from the four descriptions alone: its prompt has neither the instruction nor the
names of the preferences.
"""

import random
import re
from collections.abc import Sequence

from train.datagen.stop_patterns import StopPattern
from train.multifaceted.collection.few_shot_messages import EXAMPLES
from train.multifaceted.collection.hierarchy import (
    DIMENSIONS,
    Hierarchy,
    PlannedPreference,
    Preference,
    normalize_words,
)

PROMPT_VERSION = 2
"""Version of the wording of these prompts, of few_shot_messages.py and of hierarchy.yaml, for report.json. Raise it
with every change."""

Turn = dict[str, str]

MEANINGS = {
    "style": "how the answer is written",
    "background_knowledge": "how much the user already knows about the subject",
    "informativeness": "what the user learns from the answer",
    "harmlessness": "how the answer handles anything that could mislead, hurt or offend",
}
FEW_SHOT_MESSAGES = 3
LONGEST_PREFERENCE = 200
"""Characters; a longer line is a description or chatter, not a preference."""

_DIMENSIONS = "\n".join(f"- {dimension}: {MEANINGS[dimension]}" for dimension in DIMENSIONS)

_PROPOSE = f"""\
Users differ in what they want from an answer. I will show you an instruction and one aspect for each of up to four \
dimensions, with a few preferences that other users have expressed. For each aspect, propose one preference that a \
user giving this instruction might have. The dimensions are:
{_DIMENSIONS}

- State each preference in two to ten words. It must lead to an answer that is clearly different from a default one.
- Say what the answer should be like or whom it is for, not what it should say: the preference must also suit other \
instructions of the same kind.
- Come up with preferences of your own; the ones shown only illustrate the aspect.
- Reply with one line for each dimension shown, `dimension: preference`, and nothing else."""

_PROPOSED: tuple[tuple[str, str, str], ...] = (
    (
        "Why do leaves change color in the fall?",
        "- style, vividness (how much the reader can see, hear and feel). Examples: Told as a short scene\n"
        "- background_knowledge, novice (the user knows nothing about the subject). Examples: A curious ten-year-old\n"
        "- informativeness, depth (how far below the surface the answer goes). Examples: Includes the exceptions to "
        "the rule\n"
        "- harmlessness, accuracy (how the answer separates what is certain from what is not). Examples: Says how sure "
        "it is",
        "style: Like a guided walk that engages all five senses\n"
        "background_knowledge: Has always wondered but never read about it\n"
        "informativeness: Explains what purpose each process serves\n"
        "harmlessness: Clears up popular misconceptions",
    ),
    (
        "Write a function that finds the longest palindrome in a string.",
        "- style, tone (how the assistant sounds). Examples: Dry wit; Formal and reserved\n"
        "- informativeness, practicality (how readily the answer can be put to use). Examples: Real-world pitfalls",
        "style: A patient reviewer thinking out loud\ninformativeness: Ready to paste, edge cases included",
    ),
)


def propose(instruction: str, planned: Sequence[PlannedPreference], avoid: Sequence[str] = ()) -> list[Turn]:
    """Build the prompt for a preference in each planned sub-dimension. `avoid`: preferences of the other sets."""
    (first, shown, reply), *more = _PROPOSED
    turns = [
        _turn("user", f"{_PROPOSE}\n\n### Instruction\n{first}\n\n### Aspects\n{shown}"),
        _turn("assistant", reply),
    ]
    for example, shown, reply in more:
        turns += [
            _turn("user", f"### Instruction\n{example}\n\n### Aspects\n{shown}"),
            _turn("assistant", reply),
        ]
    shown = "\n".join(
        f"- {part.dimension}, {part.subdimension} ({part.sub.meaning}). Examples: {'; '.join(part.examples)}"
        for part in planned
    )
    ask = f"### Instruction\n{instruction}\n\n### Aspects\n{shown}"
    if avoid:
        ask += f"\n\nDo not propose any of these again: {'; '.join(avoid)}"
    return [*turns, _turn("user", ask)]


_DESCRIBE = f"""\
Users differ in what they want from an answer. I will list one user's preferences, each with its dimension and \
aspect. The dimensions are:
{_DIMENSIONS}

Describe each preference in two sentences, so that someone who knows neither its name nor the user's question \
understands what kind of answer is wanted or whom it is for. Do not bring in any particular question or subject. \
Reply with one line per dimension, `dimension: description`, and nothing else."""


def describe(preferences: Sequence[Preference], hierarchy: Hierarchy, rng: random.Random) -> list[Turn]:
    """Build the prompt for a description of each preference, with examples drawn from the hierarchy."""
    ask, reply = [], []
    for dimension in DIMENSIONS:
        described = [
            (sub.name, text, description)
            for _, sub in sorted(hierarchy[dimension].items())
            for text, description in sorted(sub.preferences.items())
            if description
        ]
        if described:
            name, text, description = rng.choice(described)
            ask.append(f"- {dimension}, {name}: {text}")
            reply.append(f"{dimension}: {description}")
    shown = "\n".join(
        f"- {preference.dimension}, {preference.subdimension}: {preference.preference}" for preference in preferences
    )
    if not ask:
        return [_turn("user", f"{_DESCRIBE}\n\n### Preferences\n{shown}")]
    return [
        _turn("user", f"{_DESCRIBE}\n\n### Preferences\n" + "\n".join(ask)),
        _turn("assistant", "\n".join(reply)),
        _turn("user", f"### Preferences\n{shown}"),
    ]


_MESSAGE = """\
You write system messages for assistants. I will give you four descriptions of what a user wants from every \
answer. Write one system message that makes an assistant answer that way.

- Give the assistant a role that fits the descriptions, and address it as "you".
- Cover everything the four descriptions ask for, in your own words and as a coherent whole.
- Make it suit any question: mention no subject that the descriptions do not mention.
- Write a single paragraph of prose, 80 to 180 words long, and nothing else."""


def write_message(descriptions: Sequence[str], rng: random.Random) -> list[Turn]:
    """Build the prompt for a system message from descriptions, which are shown in random order."""
    drawn = rng.sample(EXAMPLES, min(FEW_SHOT_MESSAGES, len(EXAMPLES)))
    turns: list[Turn] = []
    for number, example in enumerate(drawn):
        shown = "### Descriptions\n" + "\n".join(f"- {description}" for description in example.descriptions)
        turns += [_turn("user", shown if number else f"{_MESSAGE}\n\n{shown}"), _turn("assistant", example.message)]
    shown = "\n".join(f"- {description}" for description in rng.sample(descriptions, len(descriptions)))
    return [*turns, _turn("user", f"### Descriptions\n{shown}")]


def screen(instruction: str) -> list[Turn]:
    """Build the prompt that asks whether an instruction says how to answer it; the reply starts with yes or no."""
    return [
        _turn(
            "user",
            "Below is an instruction for an assistant. Apart from what it asks for, does it specify how the answer "
            "should be written: its length, format, style or tone, its audience, or the role to answer in? Ignore "
            "anything inherent in the task itself; asking for a poem or for code does not count. Reply with one word, "
            f"Yes or No.\n\n### Instruction\n{instruction}",
        )
    ]


def answer(system: str, instruction: str) -> list[Turn]:
    """Build the turns that ask for an answer to the instruction under its system message."""
    return [_turn("system", system), _turn("user", instruction)]


STOP_PATTERNS = {
    "propose": StopPattern.of_prompt("instruction", "aspects", after=r":[ \t]*\w"),
    "describe": StopPattern.of_prompt("preferences", after=r":[ \t]*\w"),
    "message": StopPattern.of_prompt(
        "descriptions",
        after=r"\A\s*(?!(?:sure|certainly|of|okay|ok|here|below|great|absolutely)\b)[^\n]{30,}[^\s:*]\s*\Z",
    ),
    "screen": StopPattern.of_prompt("instruction", after=r"\b(?:yes|no)\b"),
}
"""Stop patterns of the replies, by stage. An answer has none: it may hold any line."""

_NO_CONTENT = frozenset(("", "preference", "description", "none"))
_MARKS = " \t*_`\"'“”‘’"
_LABEL = re.compile(r"^[\W\d_]*(?P<name>[A-Za-z][A-Za-z _]*?)[*_`]*\s*(?:[,/(>–-][^:]*)?[*_`]*:(?P<text>.*)$")


def parse_dimension_lines(
    reply: str, planned: Sequence[PlannedPreference | Preference], *, cut: bool = False
) -> dict[str, str]:
    """Return the text behind each requested dimension's name; the first if a name occurs twice.

    Case, emphasis, numbers before the name and the sub-dimension behind it are ignored. `cut`: the reply was cut, so
    its last line is ignored.
    """
    asked = {part.dimension: part.subdimension for part in planned}
    lines = [line for line in reply.splitlines() if line.strip()]
    texts: dict[str, str] = {}
    for line in lines[:-1] if cut else lines:
        label = _LABEL.match(line.strip())
        name = label["name"].strip().casefold().replace(" ", "_") if label else ""
        if label is None or name not in asked or name in texts:
            continue
        text = " ".join(label["text"].split()).strip(_MARKS)
        of_sub, colon, rest = text.partition(":")  # `style: tone: Dry wit`
        if colon and normalize_words(of_sub) == normalize_words(asked[name].replace("_", " ")):
            text = rest.strip(_MARKS)
        has_content = normalize_words(text) not in _NO_CONTENT | {normalize_words(asked[name])}
        if has_content and any(map(str.isalnum, text)):
            texts[name] = text
    return texts


_FENCE = re.compile(r"^```\w*\n(?P<text>.*?)\n?```$", re.DOTALL)
_TAG = re.compile(
    r"^<(?P<name>(?:system[ _-]?)?(?:message|prompt)|system|answer|output|response)>"
    r"\s*(?P<text>.*?)\s*(?:</(?P=name)>)?$",
    re.DOTALL | re.IGNORECASE,
)
_OPENING = r"(?:sure(?: thing)?|certainly|of course|absolutely|okay|ok|great|alright|understood|got it|no problem)"
_LEAD_IN = re.compile(
    rf"^(?:{_OPENING}\b[^\n:]{{0,60}}?[.!,]*\s*\n+|[-*_=]{{3,}}\s*\n+"
    r"|(?!you\b)(?=[^\n]*\b(?:here|below|following|message|prompt|paragraph|draft|version)\b)(?![^\n]*\byou are\b)"
    r"[^\n]{0,200}:[*_]*[^\S\n]*\n+"
    rf"|(?:{_OPENING}[.!,]+[^\S\n]+)?(?:here(?: is|['’]s)|below is) [^\n:.]{{0,120}}:[*_]*\s*)",
    re.IGNORECASE,
)
_HEAD = re.compile(
    r"^[#*\s]*(?:here is |here's )?(?:the |a |your )?system (?:message|prompt)[*\s]*(?::[*\s]*|\n+)", re.IGNORECASE
)
_TRAILER = re.compile(
    r"\s*\n[^\S\n]*(?:[-*_=]{3,}[^\S\n]*(?:\n.*)?"
    r"|\W{0,3}(?:note|explanation|word count|(?:this|the) (?:system )?(?:message|prompt|paragraph)\b(?! must| should)"
    r"|let me know|i hope|feel free|please let me know|would you like)\b.*)\Z"
    r"|\s*[(\[*_]+\s*(?:word count\b[^\n]{0,30}|(?:about |approximately |~)?\d+ words)[.)\]*_\s]*\Z",
    re.DOTALL | re.IGNORECASE,
)
_QUOTES = {'"': '"', "“": "”", "«": "»"}


def parse_message(reply: str) -> str:
    """Return the system message in a reply.

    Removed are a lead-in, a heading, quotation marks, a code fence, a tag, and a note behind the message.
    """
    text, before = reply.strip(), None
    while text != before:
        before = text
        if wrapped := _FENCE.match(text) or _TAG.match(text):
            text = wrapped["text"].strip()
        text = _HEAD.sub("", text, count=1).strip()
        if (lead_in := _LEAD_IN.match(text)) and lead_in.end() < len(text):
            text = text[lead_in.end() :].strip()
        text = _without_quotes(_TRAILER.sub("", text).strip())
    return text


def _without_quotes(text: str) -> str:
    if text[:1] in _QUOTES and text.endswith(_QUOTES[text[0]]) and text.count(text[0]) + text.count(text[-1]) in (2, 4):
        inner = text[1:-1]
        if text[0] not in inner and text[-1] not in inner:
            return inner.strip()
    return text


_APOLOGY = (
    r"(?:unfortunately|regrettably|sorry|(?:my )?apologies|i(?:['’]m| am) (?:very |so |truly )?sorry"
    r"|i(?:['’]m| am) afraid|i apologi[sz]e|i regret)"
)
_DECLINES = (
    r"(?: (?:respectfully|simply|really))? ?(?:can(?:no|['’])?t|can not|could ?n[o'’]t|won['’]?t|will not|must"
    r"|decline|refuse|(?:am|['’]m) (?:unable|not (?:able|allowed|permitted|comfortable))"
    r"|(?:have|need) to (?:decline|refuse)|(?: would|['’]d) rather not|would prefer not"
    r"|do(?: not|n['’]t) feel comfortable)"
)
_REFUSALS = re.compile(
    rf"\W*(?:{_APOLOGY}(?:[,.;:!]|\s+(?:but|that|for|i)\b)|{_APOLOGY}\W*\Z|i{_DECLINES}\b"
    r"|as an? (?:\w+ ){0,2}(?:ai|language model|llm|assistant)\b[^.!?\n]{0,80}\bi\b"
    r"|i(?:['’]m| am) (?:just |only |merely )?an? (?:\w+ ){0,2}(?:ai|language model|llm)\b"
    r"|(?:this|the|your) request (?:violates|goes against|conflicts|can(?:no|['’])t))",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Return whether a reply begins with a refusal, in words with which no system message begins."""
    return bool(_REFUSALS.match(text))


_NO_PARAGRAPH = re.compile(r"^[^\S\n]*(?:#{1,6}[^\S\n]|\{\s*\"|\[\s*[{\"]|[}\]],?$|<<|</?\w+>[^\S\n]*$)", re.MULTILINE)
"""A heading, JSON, a line with nothing but a tag."""
_ASKS_BACK = re.compile(
    r"(?:^|[.!?]\s+|\n)(?:(?:could|can|would|will|do|did|may) (?:you|i)\b[^?]*\?"
    r"|(?:what|which|who) (?:are|is|would|do|did)\b[^?]*\?"
    r"|please (?:provide|share|give|send|tell|paste|specify|clarify)\b[^.?!]*\bdescriptions?\b[^?]*)\W*\Z",
    re.IGNORECASE,
)


def is_system_message(text: str) -> bool:
    """Return whether a text can be a system message: prose, and no question back to the author of the prompt."""
    return not (_NO_PARAGRAPH.search(text) or (not text.startswith("You ") and _ASKS_BACK.search(text)))


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
