"""What the model is asked: to write a system message, to judge it, and whether an answer follows it.

The words are ours; what they ask for is in sections 3.1 to 3.3 of arXiv:2502.11330. Every prompt is made of user and
assistant turns alone, as some generators have no system role, and begins with the same turns for every row, so that
servers that keep prefixes compute them once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.sysgen.tags import TAGS, Annotated

Message = Mapping[str, Any]

MEANINGS = {
    "Role": "the role, profession or identity that the assistant takes",
    "Content": "what the answer must include",
    "Task": "what is to be done",
    "Action": "how to behave or to go about it",
    "Style": "how the answer should sound",
    "Background": "what there is to know about the setting or the user",
    "Tool": "built-in or external tools that are to be used",
    "Format": "the shape of the answer",
}

_DEFINITIONS = "\n".join(f"- {tag}: {MEANINGS[tag]}" for tag in TAGS)

_WRITE = f"""\
You write system messages. I show you a conversation between a user and an assistant that had none. Write the system \
message that was given to the assistant before it: one for which these very answers would be fitting, and which would \
suit other questions of the same kind as well.

Build it of short phrases, and put each phrase between an opening and a closing tag, <<Tag>>phrase<</Tag>>, with one \
of these eight tags:
{_DEFINITIONS}

- Use the tags that the conversation gives reason for, and leave the others out. A tag may occur several times.
- Speak to the assistant ("You are ..."), in the language of the conversation.
- Say what the answers are like, not what they say: the message must not give the answer away.
- Write nothing outside the tags, no tag inside another one, and no other tags."""

_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "### User\nOur espresso machine drips after every shot. Do I need a technician?\n\n"
        "### Assistant\nProbably not yet.\n\n1. Run a cleaning cycle: residue keeps the valve from closing.\n"
        "2. Check the gasket of the group head. If it is hard or cracked, replace it (about 8 EUR).\n"
        "3. Still dripping? Then the solenoid valve is worn, and that is a job for a technician.",
        "<<Role>>You are a service adviser for household appliances.<</Role>>\n"
        "<<Content>>Name the likely causes and what a repair costs.<</Content>>\n"
        "<<Task>>Help owners find out what is wrong with their machine.<</Task>>\n"
        "<<Action>>Begin with what the owner can do alone, and say when a technician is needed.<</Action>>\n"
        "<<Format>>Give the steps as a numbered list.<</Format>>",
    ),
    (
        "### User\nWie lange fährt der nächste Zug von Bern nach Genf?\n\n"
        "### Assistant\nIch habe im Fahrplan nachgesehen: Der nächste fährt um 14:34 Uhr und ist um 16:15 Uhr in Genf, "
        "das sind 1 Stunde und 41 Minuten. Sie müssen nicht umsteigen. Gute Reise!",
        "<<Role>>Du bist der Auskunftsdienst einer Bahngesellschaft.<</Role>>\n"
        "<<Task>>Beantworte Fragen der Reisenden zu Verbindungen.<</Task>>\n"
        "<<Style>>Sei höflich und fasse dich kurz.<</Style>>\n"
        "<<Background>>Die Reisenden stehen oft schon am Bahnhof und lesen auf dem Telefon.<</Background>>\n"
        "<<Tool>>Sieh im Live-Fahrplan nach, bevor du Zeiten nennst.<</Tool>>",
    ),
    (
        "### User\nWhat does `zip(*rows)` do?\n\n"
        "### Assistant\nIt turns rows into columns. `*rows` passes each row as an argument of its own, and `zip` takes "
        "the first items of all of them, then the second ones:\n\n```python\nlist(zip(*[(1, 2), (3, 4)]))  "
        "# [(1, 3), (2, 4)]\n```\n\n### User\nAnd if they differ in length?\n\n"
        "### Assistant\nThen it stops at the shortest one, without a word. `zip(*rows, strict=True)` raises a "
        "ValueError instead:\n\n```python\nlist(zip(*[(1, 2), (3,)], strict=True))  # ValueError\n```",
        "<<Role>>You are an experienced Python developer who teaches.<</Role>>\n"
        "<<Content>>Mention the pitfall where there is one.<</Content>>\n"
        "<<Task>>Explain what a piece of Python does.<</Task>>\n"
        "<<Action>>Explain the parts one after another, from the inside out.<</Action>>\n"
        "<<Style>>Be matter-of-fact, without praise or filler.<</Style>>\n"
        "<<Background>>The user can program but is new to Python's idioms.<</Background>>\n"
        "<<Format>>Follow each explanation with a code block of a line or two that shows it.<</Format>>",
    ),
)
"""Conversations and what is to be written for them; between them they show all eight tags, a turn in another language
and a conversation of several turns."""


def generate(
    conversation: Sequence[Message], *, existing: str | None = None, remind_of: Sequence[str] = ()
) -> list[dict[str, str]]:
    """Ask for a system message for a conversation without one.

    `existing`: the one that it has, to be worked out. `remind_of`: tags to look for in particular.
    """
    ask = [f"{_WRITE}\n\nThe conversation:\n\n{_EXAMPLES[0][0]}"]
    ask += [f"The next conversation:\n\n{example}" for example, _ in _EXAMPLES[1:]]
    turns = [
        turn
        for question, (_, answer) in zip(ask, _EXAMPLES, strict=True)
        for turn in (_turn("user", question), _turn("assistant", answer))
    ]
    last = f"The next conversation:\n\n{shown(conversation)}"
    if existing is not None:
        last += (
            f"\n\n### The system message that it had\n{existing}\n\nKeep everything that this message asks for, put it "
            "into tags, and add what the conversation shows beyond it."
        )
    for tag in remind_of:
        last += (
            f"\n\nLook in particular whether the answers give reason for <<{tag}>> ({MEANINGS[tag]}). If they do, "
            "include it; if they show nothing of the kind, leave it out and invent nothing."
        )
    return [*turns, _turn("user", last)]


_JUDGE_TAGS = f"""\
Below is a system message whose phrases were put into tags, <<Tag>>phrase<</Tag>>. The eight tags mean:
{_DEFINITIONS}

Judge for each of the eight whether it is used as it is meant:
- Good: its phrases are what the tag means{{}}.
- Bad: its phrases are something else{{}}.
- None: there is no phrase with this tag, or its phrases say nothing.

Answer with eight lines and nothing else, in this form:
{{}}"""

_FORM = "\n".join(f"<<{tag}>>: {verdict}" for tag, verdict in zip(TAGS, ("Good", "Bad", "None") * 3, strict=False))


def verify(message: Annotated, exchange: Sequence[Message] | None = None) -> list[dict[str, str]]:
    """Ask for a verdict on each tag, as in section 3.3: Good, Bad or None.

    `exchange`: one turn of a longer conversation that the message is to fit as well.
    """
    fits = (", and fit the conversation", ", or contradict the conversation") if exchange else ("", "")
    ask = _JUDGE_TAGS.format(*fits, _FORM)
    if exchange:
        ask += f"\n\n### A part of the conversation that it was given for\n\n{shown(exchange)}"
    ask += f"\n\n### The system message\n{message.text}\n\n### The system message in tags\n{message.render()}"
    return [_turn("user", ask)]


def follows(system: str, question: str, answer: str) -> list[dict[str, str]]:
    """Ask whether an answer follows its system message: the reply begins with yes or no."""
    return [
        _turn(
            "user",
            "An assistant was given a system message and a question. Does its answer do what the system message asks, "
            "as far as it bears on this question? Judge that alone, not whether the answer is right. Reply with one "
            f"word, Yes or No.\n\n### System message\n{system}\n\n### Question\n{question}\n\n### Answer\n{answer}",
        )
    ]


def shown(conversation: Sequence[Message]) -> str:
    """A conversation as the prompts show it. Calls of tools are shown as JSON."""
    parts = []
    for message in conversation:
        content = message.get("content") or ""
        if message.get("tool_calls"):
            calls = [call["function"] for call in message["tool_calls"]]
            content = f"{content}\n{json.dumps(calls, ensure_ascii=False)}".strip()
        parts.append(f"### {message['role'].capitalize()}\n{content}")
    return "\n\n".join(parts)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
