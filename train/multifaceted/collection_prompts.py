"""What the model is asked for the collection, and how its replies are read.

The words are ours, the examples too. Every prompt is made of user and assistant turns alone, as some models have no
system role, and says what is to be done before what differs from row to row, so that servers that keep prefixes compute
it once. The system message is written from the four descriptions alone: neither the instruction nor the names of the
preferences are in that prompt.
"""

import random
import re
from collections.abc import Mapping, Sequence

from train.multifaceted.message_examples import EXAMPLES
from train.multifaceted.preferences import DIMENSIONS, Draw, Hierarchy, Preference, same_words

Turn = dict[str, str]

MEANINGS = {
    "style": "how the answer is written",
    "background_knowledge": "how much the user knows of the subject already",
    "informativeness": "what the answer gives the user to know",
    "harmlessness": "how the answer deals with what could mislead, hurt or offend",
}
EXAMPLES_OF_MESSAGES = 3
LONGEST_PREFERENCE = 200
"""Characters. What is longer is no preference but a description, or talk."""

_DIMENSIONS = "\n".join(f"- {dimension}: {MEANINGS[dimension]}" for dimension in DIMENSIONS)

_PROPOSE = f"""\
Users differ in what they want of an answer. I show you an instruction, and for some of four dimensions one aspect \
each, with a few preferences that users have had in it. For each aspect, name one preference that a user who gives \
this instruction could have. The dimensions are:
{_DIMENSIONS}

- Name it in three to ten words. It must lead to an answer that is clearly unlike the usual one.
- It says what the answer should be like, not what it should say: it must suit other instructions of the same kind.
- Think of one of your own; those that I show are there to tell you what is meant.
- Reply with one line for each dimension that I ask for, `dimension: preference`, and write nothing else."""

_PROPOSED: tuple[tuple[str, str, str], ...] = (
    (
        "Why do leaves change colour in autumn?",
        "- style, vividness (how much there is to see, hear and feel), such as: Told as a small scene\n"
        "- background_knowledge, novice (the user knows nothing of the subject yet), such as: A curious child of ten\n"
        "- informativeness, depth (how far below the surface the answer goes), such as: With the exceptions to the "
        "rule\n"
        "- harmlessness, accuracy (how the answer deals with what is certain and what is not), such as: Says how sure "
        "it is",
        "style: As if walking through it with open eyes\n"
        "background_knowledge: Has only ever wondered, never read about it\n"
        "informativeness: Every process down to what it is good for\n"
        "harmlessness: Popular half-truths put right",
    ),
    (
        "Write a function that finds the longest palindrome in a string.",
        "- style, tone (how the assistant sounds), such as: Dry wit; Formal and reserved\n"
        "- informativeness, practicality (how directly the answer can be put to use), such as: Pitfalls from practice",
        "style: A patient reviewer thinking aloud\ninformativeness: Ready to paste, with the cases that break it",
    ),
)


def propose(instruction: str, draws: Sequence[Draw], avoid: Sequence[str] = ()) -> list[Turn]:
    """Ask for a preference of each drawn sub-dimension. `avoid`: those that the instruction's other sets have."""
    (first, shown, reply), *more = _PROPOSED
    turns = [
        _turn("user", f"{_PROPOSE}\n\n### Instruction\n{first}\n\n### Asked for\n{shown}"),
        _turn("assistant", reply),
    ]
    for example, shown, reply in more:
        turns += [
            _turn("user", f"### Instruction\n{example}\n\n### Asked for\n{shown}"),
            _turn("assistant", reply),
        ]
    shown = "\n".join(
        f"- {one.sub.dimension}, {one.sub.name} ({one.sub.meaning}), such as: {'; '.join(one.examples)}"
        for one in draws
    )
    ask = f"### Instruction\n{instruction}\n\n### Asked for\n{shown}"
    if avoid:
        ask += f"\n\nSomething other than: {'; '.join(avoid)}"
    return [*turns, _turn("user", ask)]


_DESCRIBE = f"""\
Users differ in what they want of an answer. I name some preferences of a user, each with the dimension and aspect \
that it belongs to. The dimensions are:
{_DIMENSIONS}

Describe each preference in two sentences, so that somebody who knows neither its name nor the user's question knows \
what the answer must be like. Don't invent a question or a subject. Reply with one line for each dimension, \
`dimension: description`, and write nothing else."""


def describe(preferences: Sequence[Preference], hierarchy: Hierarchy, chance: random.Random) -> list[Turn]:
    """Ask for a description of each preference. The examples are drawn from those of the hierarchy that have one."""
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
You write system messages for assistants. I show you four descriptions of what a user wants of answers, whatever will \
be asked. Write the one system message that makes an assistant answer like that.

- Give the assistant a role that goes with them, and speak to it: "You are ..."
- Everything the four descriptions ask for must be in it, in your own words, as one whole.
- It must suit any question: name no subject that the descriptions don't name.
- Write a paragraph of 80 to 180 words of running text, and nothing before or after it."""


def message(descriptions: Sequence[str], chance: random.Random) -> list[Turn]:
    """Ask for a system message from descriptions, which come in an order of their own."""
    drawn = chance.sample(EXAMPLES, min(EXAMPLES_OF_MESSAGES, len(EXAMPLES)))
    turns: list[Turn] = []
    for number, example in enumerate(drawn):
        shown = "### Descriptions\n" + "\n".join(f"- {one}" for one in example.descriptions)
        turns += [_turn("user", shown if number else f"{_MESSAGE}\n\n{shown}"), _turn("assistant", example.message)]
    shown = "\n".join(f"- {one}" for one in chance.sample(descriptions, len(descriptions)))
    return [*turns, _turn("user", f"### Descriptions\n{shown}")]


def screen(instruction: str) -> list[Turn]:
    """Ask whether an instruction says how it is to be answered: the reply begins with yes or no."""
    return [
        _turn(
            "user",
            "Below is an instruction for an assistant. Does it say, beside what is wanted, how the answer is to be "
            "written: its length, form, style or tone, for whom it is, or in whose role? What the task itself makes "
            "necessary (a poem where a poem is asked for, code where code is) doesn't count. Reply with one word, Yes "
            f"or No.\n\n### Instruction\n{instruction}",
        )
    ]


def answer(system: str, instruction: str) -> list[Turn]:
    """The instruction under its system message."""
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
