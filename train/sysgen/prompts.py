"""Prompts of SYSGEN: write a system message, judge its tags, judge whether an answer follows it.

The wording is ours; the requirements are those of sections 3.1 to 3.3 of arXiv:2502.11330. Every prompt consists of
user and assistant turns only, since some generators have no system role, and starts with the same turns for every row,
so that servers with a prefix cache compute them once.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from train.datagen.stop_patterns import StopPattern
from train.sysgen.tags import TAGS, TaggedMessage
from train.sysgen.verdicts import PLACEHOLDER_VERDICTS

PROMPT_VERSION = 2
"""Version of the wording of these prompts and of constraints.py, for report.json. Raise it with every change."""

Message = Mapping[str, Any]

MEANINGS = {
    "Role": "the role, profession or identity the assistant takes on",
    "Content": "what the answer must include",
    "Task": "what the assistant should do",
    "Action": "how the assistant should behave or proceed",
    "Style": "how the answer should sound",
    "Background": "what the assistant should know about the setting or the user",
    "Tool": "built-in or external tools to use",
    "Format": "the shape of the answer",
}

_DEFINITIONS = "\n".join(f"- {tag}: {MEANINGS[tag]}" for tag in TAGS)

_WRITE = f"""\
You write system messages. I will show you a conversation between a user and an assistant. Write the system message \
that could have come before it. An assistant that received your message should naturally give the answers \
shown{{general}}.

Build it from short phrases. Put each phrase between an opening and a closing tag, <<Tag>>phrase<</Tag>>, using one of \
these eight tags:
{_DEFINITIONS}

- Use the tags that the conversation calls for and leave out the others. You may use a tag more than once.
- Speak to the assistant directly ("You are ...") in the language of the conversation.{{no_leak}}
- Write nothing outside the tags, do not put one tag inside another, and use only these eight tags."""

_GENERAL = ", and the message should work just as well for other questions of the same kind"
_NO_LEAK = "\n- Describe what the answers are like, not what they say: the message must not give the answer away."

_EXAMPLES: tuple[tuple[str, str], ...] = (
    (
        "### User\nMy espresso machine drips after every shot. Do I need a technician?\n\n"
        "### Assistant\nProbably not yet.\n\n1. Run a cleaning cycle: residue can keep the valve from closing.\n"
        "2. Check the group head gasket. If it is hard or cracked, replace it (about $8).\n"
        "3. Still dripping? Then the solenoid valve is worn, and that is a job for a technician.",
        "<<Role>>You are a service advisor for household appliances.<</Role>>\n"
        "<<Content>>Name the likely causes and what the parts cost.<</Content>>\n"
        "<<Task>>Help owners find out what is wrong with their machine.<</Task>>\n"
        "<<Action>>Start with what owners can do themselves, and say when a technician is needed.<</Action>>\n"
        "<<Format>>Give the steps as a numbered list.<</Format>>",
    ),
    (
        "### User\nWie lange braucht der nächste Zug von Bern nach Genf?\n\n"
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
        "### Assistant\nIt turns rows into columns. `*rows` passes each row as a separate argument, and `zip` collects "
        "the first item of every row, then the second, and so on:\n\n```python\nlist(zip(*[(1, 2), (3, 4)]))  "
        "# [(1, 3), (2, 4)]\n```\n\n### User\nWhat if they differ in length?\n\n"
        "### Assistant\nThen it silently stops at the shortest one. `zip(*rows, strict=True)` raises a "
        "ValueError instead:\n\n```python\nlist(zip(*[(1, 2), (3,)], strict=True))  # ValueError\n```",
        "<<Role>>You are an experienced Python developer and teacher.<</Role>>\n"
        "<<Content>>Point out pitfalls where there are any.<</Content>>\n"
        "<<Task>>Explain what a piece of Python code does.<</Task>>\n"
        "<<Action>>Explain the parts one by one, from the inside out.<</Action>>\n"
        "<<Style>>Be matter-of-fact, without praise or filler.<</Style>>\n"
        "<<Background>>The user knows how to program but is new to Python idioms.<</Background>>\n"
        "<<Format>>Follow each explanation with a code block of one or two lines that illustrates it.<</Format>>",
    ),
)
"""Few-shot examples: conversations with their messages. Together they show all eight tags, a language other than
English and a conversation of several turns."""


def generate(
    conversation: Sequence[Message],
    *,
    existing: str | None = None,
    remind_of: Sequence[str] = (),
    forbid_leak: bool = True,
) -> list[dict[str, str]]:
    """Build the prompt for a system message of a conversation.

    Args:
        conversation: the turns, without a system message.
        existing: the conversation's own system message, to be elaborated.
        remind_of: tags to look for in particular.
        forbid_leak: ask for a message that suits similar questions and does not give the answer away. The paper asks
            for neither.
    """
    task = _WRITE.format(general=_GENERAL, no_leak=_NO_LEAK) if forbid_leak else _WRITE.format(general="", no_leak="")
    questions = [f"{task}\n\nThe conversation:\n\n{_EXAMPLES[0][0]}"]
    questions += [f"The next conversation:\n\n{example}" for example, _ in _EXAMPLES[1:]]
    turns = [
        turn
        for question, (_, answer) in zip(questions, _EXAMPLES, strict=True)
        for turn in (_turn("user", question), _turn("assistant", answer))
    ]
    last = f"The next conversation:\n\n{format_conversation(conversation)}"
    if existing is not None:
        last += (
            f"\n\n### Its existing system message\n{existing}\n\nRewrite this message in tagged phrases: keep "
            "everything it asks for, and add whatever else the conversation calls for."
        )
    for tag in remind_of:
        last += (
            f"\n\nPay particular attention to <<{tag}>> ({MEANINGS[tag]}): include it if the answers call for it; "
            "otherwise leave it out rather than invent something."
        )
    return [*turns, _turn("user", last)]


_JUDGE_TAGS = f"""\
Below is a system message whose phrases have been tagged, <<Tag>>phrase<</Tag>>. The eight tags are defined as \
follows:
{_DEFINITIONS}

Judge for each of the eight tags whether it is used as defined:
- Good: its phrases match the definition{{}}.
- Bad: at least one of its phrases does not match the definition{{}}.
- None: no phrase has this tag, or its phrases say nothing of substance (as in "No special tools are needed"), in \
which case neither Good nor Bad applies.

Reply with eight lines in this form and nothing else; the verdicts shown are placeholders:
{{}}"""

_FORM = "\n".join(f"<<{tag}>>: {verdict}" for tag, verdict in PLACEHOLDER_VERDICTS.items())


def verify(message: TaggedMessage, exchange: Sequence[Message] | None = None) -> list[dict[str, str]]:
    """Build the prompt for a verdict on each tag, as in section 3.3: Good, Bad or None.

    `exchange`: one exchange of a longer conversation, which the message must fit as well.
    """
    fits = (" and fit the conversation", " or does not fit the conversation") if exchange else ("", "")
    ask = _JUDGE_TAGS.format(*fits, _FORM)
    if exchange:
        ask += f"\n\n### Part of the conversation it was written for\n\n{format_conversation(exchange)}"
    ask += f"\n\n### The system message\n{message.text}\n\n### The system message with tags\n{message.render()}"
    return [_turn("user", ask)]


def judge(system: str, question: str, answer: str) -> list[dict[str, str]]:
    """Build the prompt that asks whether an answer follows its system message; the reply starts with yes or no."""
    return [
        _turn(
            "user",
            "An assistant was given a system message and a question. Does its answer do what the system message asks "
            "for, to the extent that the message applies to this question? Judge only this, not whether the answer is "
            f"correct. Reply with one word, Yes or No.\n\n### System message\n{system}\n\n### Question\n{question}"
            f"\n\n### Answer\n{answer}",
        )
    ]


STOP_PATTERNS = {
    "generate": StopPattern.of_prompt("tool", after=r"<<[/\\](?!.*<<)"),  # not inside a phrase
    "verify": StopPattern.of_prompt(
        "tool", "part of the conversation.*", "the system message with tags", after=r"\b(?:good|bad|none)\b"
    ),
    "judge": StopPattern.of_prompt("question", "answer", after=r"\b(?:yes|no)\b"),
}
"""Stop patterns of the replies, by stage. A new answer has none: it may hold any line."""


def format_conversation(conversation: Sequence[Message]) -> str:
    """Return a conversation as text for the prompts, with tool calls as JSON."""
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
