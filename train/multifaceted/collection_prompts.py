"""The prompts of the collection, and the reading of their replies.

The wording and the examples are ours. Every prompt consists of user and assistant turns only, as some models have no
system role, and states the task before anything that differs between rows, so that servers with a prefix cache compute
it once. The system message is written from the four descriptions alone: its prompt holds neither the instruction nor
the names of the preferences.
"""

import random
import re
from collections.abc import Mapping, Sequence

from train.multifaceted.message_examples import EXAMPLES
from train.multifaceted.preferences import DIMENSIONS, Draw, Hierarchy, Preference, same_words

PROMPT_VERSION = 2
"""The wording of these prompts, of message_examples.py and of hierarchy.yaml, for report.json. Raise it with every
change of wording."""

Turn = dict[str, str]

MEANINGS = {
    "style": "how the answer is written",
    "background_knowledge": "how much the user already knows about the subject",
    "informativeness": "what the user learns from the answer",
    "harmlessness": "how the answer handles anything that could mislead, hurt or offend",
}
EXAMPLES_OF_MESSAGES = 3
LONGEST_PREFERENCE = 200
"""Characters. Anything longer is a description or chatter, not a preference."""

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


def propose(instruction: str, draws: Sequence[Draw], avoid: Sequence[str] = ()) -> list[Turn]:
    """Ask for a preference in each drawn sub-dimension. `avoid`: those of the instruction's other sets."""
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
        f"- {one.sub.dimension}, {one.sub.name} ({one.sub.meaning}). Examples: {'; '.join(one.examples)}"
        for one in draws
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


def describe(preferences: Sequence[Preference], hierarchy: Hierarchy, chance: random.Random) -> list[Turn]:
    """Ask for a description of each preference, with examples drawn from the described ones of the hierarchy."""
    ask, reply = [], []
    for dimension in DIMENSIONS:
        described = [
            (sub.name, text, description)
            for _, sub in sorted(hierarchy[dimension].items())
            for text, description in sorted(sub.preferences.items())
            if description
        ]
        if described:
            name, text, description = chance.choice(described)
            ask.append(f"- {dimension}, {name}: {text}")
            reply.append(f"{dimension}: {description}")
    shown = "\n".join(f"- {one.dimension}, {one.subdimension}: {one.preference}" for one in preferences)
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


def message(descriptions: Sequence[str], chance: random.Random) -> list[Turn]:
    """Ask for a system message from descriptions, which are shown in a drawn order."""
    drawn = chance.sample(EXAMPLES, min(EXAMPLES_OF_MESSAGES, len(EXAMPLES)))
    turns: list[Turn] = []
    for number, example in enumerate(drawn):
        shown = "### Descriptions\n" + "\n".join(f"- {one}" for one in example.descriptions)
        turns += [_turn("user", shown if number else f"{_MESSAGE}\n\n{shown}"), _turn("assistant", example.message)]
    shown = "\n".join(f"- {one}" for one in chance.sample(descriptions, len(descriptions)))
    return [*turns, _turn("user", f"### Descriptions\n{shown}")]


def screen(instruction: str) -> list[Turn]:
    """Ask whether an instruction says how to answer it. The reply starts with yes or no."""
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
    """Ask for an answer to the instruction under its system message."""
    return [_turn("system", system), _turn("user", instruction)]


_MARKS = " \t*_`\"'“”‘’"
_LABEL = re.compile(r"^[\W\d_]*(?P<name>[A-Za-z][A-Za-z _]*?)[*_`]*\s*(?:[,/(>–-][^:]*)?[*_`]*:(?P<text>.*)$")


def read_lines(reply: str, draws: Sequence[Preference] | Sequence[Draw], *, cut: bool = False) -> dict[str, str]:
    """The text behind each dimension's name, for those that were asked for; of a name that comes twice the first.

    Case, marks, numbers before the name and the sub-dimension behind it don't matter. `cut`: the last line has no end.
    """
    asked: Mapping[str, str] = {
        one.dimension if isinstance(one, Preference) else one.sub.dimension: (
            one.subdimension if isinstance(one, Preference) else one.sub.name
        )
        for one in draws
    }
    lines = [line for line in reply.splitlines() if line.strip()]
    found: dict[str, str] = {}
    for line in lines[:-1] if cut else lines:
        label = _LABEL.match(line.strip())
        name = label["name"].strip().casefold().replace(" ", "_") if label else ""
        if label is None or name not in asked or name in found:
            continue
        text = " ".join(label["text"].split()).strip(_MARKS)
        of_sub, colon, rest = text.partition(":")  # `style: tone: Dry wit`
        if colon and same_words(of_sub) == same_words(asked[name].replace("_", " ")):
            text = rest.strip(_MARKS)
        says_something = same_words(text) not in ("", same_words(asked[name]), "preference", "description", "none")
        if says_something and any(map(str.isalnum, text)):
            found[name] = text
    return found


_FENCE = re.compile(r"^```\w*\n(?P<text>.*?)\n?```$", re.DOTALL)
_HEAD = re.compile(
    r"^[#*\s]*(?:here is |here's )?(?:the |a )?system (?:message|prompt)[*\s]*(?::[*\s]*|\n+)", re.IGNORECASE
)
_QUOTES = {'"': '"', "“": "”", "«": "»"}


def read_message(reply: str) -> str:
    """A system message without what models put around one: a heading, quotation marks, a block of code."""
    text = reply.strip()
    if fenced := _FENCE.match(text):
        text = fenced["text"].strip()
    text = _HEAD.sub("", text, count=1).strip()
    if text[:1] in _QUOTES and text.endswith(_QUOTES[text[0]]) and text.count(text[0]) + text.count(text[-1]) in (2, 4):
        inner = text[1:-1]
        if text[0] not in inner and text[-1] not in inner:
            text = inner.strip()
    return text


_REFUSALS = re.compile(
    r"\W*(?:i(?:['’]m| am) (?:very |so )?sorry\b|sorry, (?:but )?i\b|i apologi[sz]e\b"
    r"|(?:unfortunately, )?i(?: am|['’]m) (?:not able|unable) to\b|i (?:can(?:no|['’])?t|won['’]t|will not) "
    r"(?:help|assist|write|create|do|provide|fulfil|comply)|as an ai\b)",
    re.IGNORECASE,
)


def is_refusal(text: str) -> bool:
    """Whether a model declines, in words that no system message begins with."""
    return bool(_REFUSALS.match(text))


def _turn(role: str, content: str) -> Turn:
    return {"role": role, "content": content}
