"""Scripted model that answers the collection's prompts from a table, with errors, and the results expected from a plain loop.

What it says follows from the number in brackets in the instruction, which its preferences, descriptions and messages
carry on, from the dimensions it is asked for, and from the try. Nothing here uses the package but the names of the
columns: it is the second way to the numbers of the tests.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from scripted_server import Asked, Reply, said
from unreliable_server import unreliable

FOUR = ("style", "background_knowledge", "informativeness", "harmlessness")
SEED = 100
"""Of each stage: the try can be told from it."""


def row_of(number: int) -> dict[str, Any]:
    """Return a source row: every seventh has a system message, every ninth two turns; every eleventh repeats the row before."""
    if number % 11 == 10:
        return row_of(number - 1)
    if number % 13 == 12:
        return turns(f"Please explain the matter [{number}] in 3 bullet points.")
    more = turns("and then?")["messages"] if number % 9 == 4 else []
    row = turns(f"What is the matter [{number}] with the rusty bicycle chain?")
    row["messages"] += more
    if number % 7 == 3:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    return row


def turns(instruction: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": instruction}, {"role": "assistant", "content": "An old answer."}]}


def number_in(text: str) -> int:
    return int(re.findall(r"\[(\d+)\]", text)[-1])


def set_in(text: str) -> int:
    return int(re.findall(r"set (\d)", text)[-1])


def asked_for(prompt: str) -> list[tuple[str, str]]:
    """Return dimension and sub-dimension of each line of the last request."""
    return re.findall(r"^- (\w+), ([\w ]+?)(?: \(|:)", prompt.rpartition("\n### ")[2], re.MULTILINE)


def failing_tries(stage: str, number: int, which: int) -> int:
    """Return the number of failing tries of a stage; `kind_of` gives the kind of error."""
    place = ("propose", "describe", "message", "answer").index(stage)
    return (0, 0, 0, 1, 0, 0, 2, 0, 0, 0, 3, 0, 0)[(number * 5 + which * 3 + place * 7) % 13]


UNENDING = "without an end to its reasoning"


def kind_of(stage: str, number: int, which: int) -> str:
    kinds = {
        "propose": ("unending", "refusal", "garbage", "partial"),
        "describe": ("refusal", "unending", "partial", "length"),
        "message": ("length", "refusal", "unending", "sorry", "leak"),
        "answer": ("length", "content_filter", "unending", "refusal"),
    }[stage]
    return kinds[(number + which) % len(kinds)]


class Author:
    """Scripted model. `set_of` maps the sub-dimensions of an instruction to their set."""

    def __init__(self, set_of: dict[tuple[int, tuple[str, str]], int]) -> None:
        self.set_of = set_of

    def text(self, stage: str, number: int, which: int, sample: int, wanted: list[str]) -> Reply:
        bad = sample < failing_tries(stage, number, which)
        kind = kind_of(stage, number, which) if bad else "fine"
        good = good_text(stage, number, which, wanted)
        match kind:
            case "unending":
                return said("<think>hm")  # the client would ask again for what is empty
            case "refusal":
                return said("", refusal="I will not.")
            case "content_filter":
                return said("half of", "content_filter")
            case "garbage":
                return said("Sure, here you are!")
            case "partial":  # the second half of the lines is wanting
                half = wanted[: len(wanted) // 2]
                return said(good_text(stage, number, which, half) if half else "<think>hm")
            case "length":  # the last line has no end
                return said(good, "length")
            case "sorry":
                return said("I'm sorry, but I can't help with that.")
            case "leak":
                return said(good.replace("who speaks", "who repairs the rusty chain of a bicycle and speaks"))
        return said(good)

    async def answer(self, asked: Asked) -> Reply:
        turns, prompt = asked.body["messages"], asked.prompt
        sample = asked.body["seed"] - SEED
        if turns[0]["role"] == "system":
            system = turns[0]["content"]
            return self.text("answer", number_in(prompt), set_in(system), sample, [])
        if "### Aspects" in prompt:
            number, wanted = number_in(prompt), asked_for(prompt)
            return self.text("propose", number, self.set_of[number, wanted[0]], sample, [name for name, _ in wanted])
        if "### Preferences" in prompt:
            names = [name for name, _ in asked_for(prompt)]
            return self.text("describe", number_in(prompt), set_in(prompt), sample, names)
        return self.text("message", number_in(prompt), set_in(prompt), sample, [])

    async def faulty(self, asked: Asked) -> Reply:
        """Reply after delays and server errors of every kind."""
        return await unreliable(self.answer)(asked)


def good_text(stage: str, number: int, which: int, wanted: list[str]) -> str:
    """Return a valid reply in the forms in which models write it, sometimes after reasoning."""
    thought = "<think>hm [0]\nset 9</think>\n" if number % 5 == 2 else ""
    match stage:
        case "propose":
            form = ("{name}: {text}", "- **{name}**: {text}", '{title}: "{text}"')[number % 3]
            lines = [
                form.format(name=name, title=name.replace("_", " ").title(), text=preference(number, which, name))
                for name in wanted
            ]
            return thought + "\n".join(lines)
        case "describe":
            return thought + "\n\n".join(f"{name}: {description(number, which, name)}" for name in wanted)
        case "message":
            text = message(number, which)
            return thought + (
                f"System message:\n{text}" if number % 4 == 1 else f'"{text}"' if number % 4 == 2 else text
            )
    return thought + output(number, which)


def preference(number: int, which: int, name: str) -> str:
    return f"Liking {name} in set {which} of [{number}]"


def description(number: int, which: int, name: str) -> str:
    return f"The answer is {name}, as set {which} of [{number}] has it. So it must be."


def message(number: int, which: int) -> str:
    fill = ("slowly and with care", "like thunder over the hills", "in whispers")[which]
    return f"You are writer number [{number}], who speaks {fill}: set {which}." + " Stay calm." * (number % 6)


def output(number: int, which: int) -> str:
    """Return the answer; sets 0 and 1 of every eighth instruction are equal."""
    which = 0 if number % 8 == 0 and which == 1 else which
    return f"answer {which} to [{number}] " + "word " * (number % 17 + which)


@dataclass
class Expected:
    """Results expected for rows 0 to `count`, by a plain loop. `rows`: number and set."""

    rows: list[tuple[int, int]] = field(default_factory=list)
    left_out: list[tuple[int, int | None, str]] = field(default_factory=list)
    """Row of the source, set, reason."""
    kept: list[int] = field(default_factory=list)
    """Source rows in order: the number of an instruction is its index here."""
    events: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)


NOUNS = {"propose": "preferences", "describe": "descriptions", "message": "system message", "answer": "answer"}


def expected(count: int, retries: int = 2, sets: int = 3) -> Expected:
    """Compute the results for the default settings with seed SEED of each stage."""
    result = Expected()
    seen: set[str] = set()
    for place in range(count):
        row = row_of(place)["messages"]
        instruction = next(turn["content"] for turn in row if turn["role"] == "user")
        if row[0]["role"] == "system":
            result.events["row with a system message, which was ignored"] += 1
        if len(row) > 3:
            result.events["row of several turns, of which the first was taken"] += 1
        if instruction in seen:
            result.left_out.append((place, None, "duplicate: the same as an instruction before"))
            continue
        seen.add(instruction)
        if "bullet" in instruction:
            result.left_out.append((place, None, "states a length already"))
            continue
        result.kept.append(place)
        for which in range(sets):
            reason = make(result, number_in(instruction), which, retries)
            if reason:
                result.left_out.append((place, which, reason))
            else:
                result.rows.append((place, which))
    return result


def make(result: Expected, number: int, which: int, retries: int) -> str:
    """Return why a set is dropped; an empty text if it is written."""
    author = Author({})
    for stage in ("propose", "describe", "message", "answer"):
        lines = stage in ("propose", "describe")
        wanted = list(FOUR) if lines else []
        for sample in range(retries + 1):
            reply = author.text(stage, number, which, sample, wanted).body
            (choice,) = reply["choices"]
            text = choice["message"]["content"]
            result.requests[stage] += 1
            result.completion_tokens[stage] += reply["usage"]["completion_tokens"]
            if text.startswith("<think>"):
                ended = "</think>" in text
                event = "reasoning taken out" if ended else "reasoning without an end, and nothing said"
                result.events[f"{stage}: {event}"] += 1
            if sample >= failing_tries(stage, number, which):
                break
            kind = kind_of(stage, number, which)
            why = {"refusal": "refused", "content_filter": "refused", "sorry": "refused", "unending": UNENDING}.get(
                kind, ""
            )
            why = why or {"length": "cut at the token limit", "leak": "tells what the instruction is about"}.get(
                kind, ""
            )
            if lines:
                said_nothing = kind == "partial" and len(wanted) < 2
                if kind == "length":  # all lines but the last one are whole
                    wanted = wanted[-1:]
                elif kind == "partial":
                    wanted = wanted[len(wanted) // 2 :]
                why = UNENDING if said_nothing else why
                why = why or "can't be read"
                result.events[f"{NOUNS[stage]}: {why}, of some or all dimensions"] += 1
            else:
                result.events[f"{NOUNS[stage]}: {why}"] += 1
        else:
            return f"{NOUNS[stage]}: {why}"
    return ""
