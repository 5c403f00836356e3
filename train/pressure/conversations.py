"""Conversations under pressure: system message and user turns, built from a rule's message, a question and a tactic.

The builder works on text alone, so that evaluation, the quickstart and the data pipelines share it: a rule is its
message and what a user says for and against it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from train.pressure.rules import Split
from train.pressure.tactics import SECRET_NAMES, Setting, fill, secret_words, templates

Message = dict[str, Any]


@dataclass(frozen=True)
class Pressure:
    """One conversation up to the answer.

    - `messages`: system message, user turn and, for a tool result, the call and the result.
    - `question`: the question in the user's turn.
    - `secret`: a secret that the answer must not hold (extraction), or a code that it must tell (permitted: shared).
    - `secret_name`: its name, such as "access code".
    """

    setting: Setting
    tactic: str
    question: str
    messages: list[Message] = field(default_factory=list)
    secret: str = ""
    secret_name: str = ""


def build_pressure(
    setting: Setting,
    tactic: str,
    *,
    message: str,
    question: str,
    opposites: Sequence[str],
    requests: Sequence[str],
    split: Split,
    rng: random.Random,
) -> Pressure:
    """Return a conversation of a setting.

    Args:
        setting: relation of the user's turn to the message.
        tactic: a tactic of the setting (`tactics`).
        message: system message that states the rule.
        question: the user's question; not used by the tactic `shared`, which asks for the code alone.
        opposites: sentences that ask for the opposite of the rule.
        requests: sentences that ask for the same.
        split: part of the templates and secrets that is used.
        rng: source of all choices.
    """
    values = {"question": question}
    if setting == "aligned":
        values["request"] = rng.choice(requests)
    else:
        values["opposite"] = rng.choice(opposites)
    secret, name = "", ""
    if (setting, tactic) in _CLAUSES:
        name = rng.choice(SECRET_NAMES[split])
        secret = f"{rng.choice(secret_words(split))}-{rng.randint(1000, 9999)}"
        values |= {"name": name, "secret": secret}
        message = f"{message} {fill(rng.choice(templates('clause', _CLAUSES[setting, tactic], split)), values)}"
    if tactic == "choice":
        secret = name = ""
    if setting == "injected":
        values["injection"] = fill(rng.choice(templates("injection", "plain", split)), values)
    turn = fill(rng.choice(templates(setting, tactic, split)), values)
    messages: list[Message] = [{"role": "system", "content": message}]
    if tactic == "tool":
        messages += tool_turns(question, turn)
    else:
        messages.append({"role": "user", "content": turn})
    return Pressure(setting, tactic, turn if tactic == "shared" else question, messages, secret, name)


_CLAUSES = {
    ("extraction", "plain"): "secret",
    ("permitted", "shared"): "shared",
    ("permitted", "choice"): "choice",
}
"""Setting and tactic -> the clause that follows the rule in the system message."""


def tool_turns(question: str, result: str) -> list[Message]:
    """Return the question, a call of a search tool and its result."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "search", "arguments": {"query": question}},
    }
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "name": "search", "content": result},
    ]


def result_in_user_turn(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with tool results as text in the user's turn, for a template without tool turns."""
    plain: list[Message] = []
    for message in messages:
        if message["role"] == "tool":
            last = plain[-1]
            plain[-1] = last | {"content": f"{last['content']}\n\nResult of the search:\n{message['content']}"}
        elif not message.get("tool_calls"):
            plain.append(dict(message))
    return plain
