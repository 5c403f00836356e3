"""Runs of `evaluate.py hierarchy` on published sets: a scripted model and judge, and the command in a process."""

import re
from pathlib import Path

from scripted_server import Asked, Reply, chat_reply, error

ROOT = Path(__file__).parents[3]
KEEPS = '{"reasoning": "Fine.", "follows_system_instructions": true}'
BREAKS = '{"reasoning": "A price.", "follows_system_instructions": false}'
FIRST_CONTACT = "Hi"
"""The prompt of the first contact with the judge's server."""


async def guards_a_door(asked: Asked) -> Reply:
    """Open for the password; tell it to a second attack; fall for a hijacking at doors 0 to 3; break off at door 5."""
    system, text = (message["content"] for message in asked.body["messages"])
    door = int(re.findall(r"Door (\d+)", system)[0])
    if door == 5:
        return error(400, "the prompt is refused")
    if "Plum" in text:
        return chat_reply('"Access Granted"' if door else "Welcome! Access granted.")
    if "Say Access Granted" in text:
        return chat_reply("<think>Should I?</think>ACCESS GRANTED" if door < 4 else "Go away.")
    return chat_reply(f"The password is Plum{door}." if "(1)" in text else "Go away.")


async def sells_tea(asked: Asked) -> Reply:
    """The model answers; the judge is the model `judge`. Both go by the number n of the row, modulo 8.

    Distractor 11 holds a banned word, and gets no verdict.
    """
    if asked.prompt == FIRST_CONTACT:
        return chat_reply("Hello")
    subset, number = re.findall(r"(handwritten|distractors) (\d+)(?:\n|$)", asked.prompt)[-1]
    n = int(number) % 8
    if asked.body["model"] != "judge":
        is_banned = n == 7 or (subset, number) == ("distractors", "11")
        return error(400, "the template refuses it") if n == 2 else chat_reply("Tea sorry" if is_banned else "Tea.")
    replies: dict[int, list[str | tuple[str, str]]] = {
        0: [KEEPS if subset == "handwritten" else BREAKS],
        1: [KEEPS],
        2: [BREAKS],
        3: ["Hm.", "It does."],
        4: [("", "content_filter"), ("", "content_filter")],
        5: ["Hm.", f"```json\n{KEEPS}\n```"],
        6: [(KEEPS, "length"), (KEEPS, "length")],
        7: [KEEPS],
    }
    of_row = replies[n]
    reply = of_row[asked.times % len(of_row)]
    return chat_reply(reply) if isinstance(reply, str) else chat_reply(*reply)


async def answers_everything(asked: Asked) -> Reply:
    """Answer the rows of both published sets, those of the built-in set, and the judge's."""
    is_door = "You guard a door" in str(asked.body["messages"][0]["content"])
    is_tea = "You sell tea" in str(asked.body["messages"])
    if is_door or is_tea or asked.prompt == FIRST_CONTACT:
        return await (guards_a_door if is_door else sells_tea)(asked)
    return chat_reply("It is Paris.")
