"""Scripted model that answers SYSGEN's prompts from a table, with errors, and the results expected from a plain loop.

What it says follows from the number in brackets that is in every question and every phrase. Nothing here uses the
package: it is the second way to the numbers of the tests.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from scripted_server import Asked, Reply, said
from unreliable_server import unreliable

EIGHT = ("Role", "Content", "Task", "Action", "Style", "Background", "Tool", "Format")
SEED = 100


@dataclass(frozen=True)
class Case:
    """The message written for a row, and the phrases that the filter must keep. `#` stands for the row's number."""

    written: str
    kept: tuple[tuple[str, str], ...]
    repairs: dict[str, int] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()


CASES = (
    Case(
        "<<Format>>a list [#]<</Format>>\n<<Role>>a nurse [#]<</Role>>\n<<Style>>warm [#]<</Style>>",
        (("Role", "a nurse [#]"), ("Style", "warm [#]"), ("Format", "a list [#]")),
    ),
    Case(
        "".join(f"<<{tag}>>{tag.lower()} here [#]<</{tag}>>" for tag in reversed(EIGHT)),
        tuple((tag, f"{tag.lower()} here [#]") for tag in EIGHT),
    ),
    Case(
        "<<Role>>a pilot [#]<<Role>> <<Task>>fly [#]<<//Task>>",
        (("Role", "a pilot [#]"), ("Task", "fly [#]")),
        {"opening tag as closer": 1, "slashes": 1},
    ),
    Case(
        "<<Background >>at night [#]<</ Background>><<Tasks>>see [#]<</Tasks>><<style>>calm [#]<</STYLE>>",
        (("Task", "see [#]"), ("Style", "calm [#]"), ("Background", "at night [#]")),
        {"blanks inside": 2, "plural": 2, "upper or lower case": 2},
    ),
    Case(
        "Sure! <<Role>>a cook [#]<</Role>><<Example>>soup<</Example>><<System>>be good<</System>>",
        (("Role", "a cook [#]"),),
        {},
        ("none of the eight tags", "none of the eight tags", "outside any tag"),
        ("Example", "System"),
    ),
    Case(
        "<<Task>>dig [#]<</Task>><<Tool>>a spade [#] <<Content>>depth [#]<</Format>>",
        (("Task", "dig [#]"),),
        {},
        ("closed and never opened", "never closed", "never closed"),
    ),
    Case(
        "<<Action>>first <<Style>>softly [#]<</Style>> then [#]<</Action>>",
        (("Action", "first softly [#] then [#]"),),
        {},
        ("part of the phrase around it",),
    ),
    Case(
        "<<Task>><<Tool>>use grep [#]<</Tool>><</Task>><<Tool>>and sed [#]<</Tool>>",
        (("Tool", "use grep [#]"), ("Tool", "and sed [#]")),
    ),
    Case(
        "<<Format>>like\n```\n<<Role>>x<</Role>>\n```\n[#]<</Format>>",
        (("Format", "like\n```\n<<Role>>x<</Role>>\n```\n[#]"),),
    ),
    Case("I would rather not. [#]", (), {}, ("outside any tag",)),
    Case("<<Role>><</Role>><<Conversational History>>none [#]<</Conversational History>>", (), {},
         ("empty", "none of the eight tags"), ("Conversational History",)),
    Case(
        "<<Stil>>freundlich [#]<</Stil>><<Style>>höflich und 简短 [#]<</Style>>",
        (("Style", "höflich und 简短 [#]"),),
        {},
        ("none of the eight tags",),
        ("Stil",),
    ),
    Case("<think>hm", ()),  # the client would ask again for what is empty
)  # fmt: skip


def case_of(number: int, sample: int) -> Case:
    """Return the case of a row; two thirds of the rows without a valid first message get one at the second try."""
    case = CASES[number % len(CASES)]
    if not case.kept and sample and number % 3:
        return Case(f"<<Task>>at last [#] {sample}<</Task>>", (("Task", f"at last [#] {sample}"),))
    return case


def verdict_of(number: int, turn: int, tag: str) -> str | None:
    """Return the verdict on a tag; None if the model omits it."""
    place = EIGHT.index(tag)
    if (number + place) % 37 == 0:
        return None
    return ("Good", "Good", "Good", "Bad", "Good", "Good", "None", "Good", "Good")[(number * 5 + place * 2 + turn) % 9]


def verdict_line(number: int, turn: int, tag: str) -> str:
    """Return a verdict, mostly in the prompt's form."""
    verdict = verdict_of(number, turn, tag)
    if verdict is None:
        return f"<<{tag}>>: I can't say"
    return f"- **{tag}**: {verdict}" if number % 13 == 5 else f"<<{tag}>>: {verdict}"


def answer_of(number: int, turn: int) -> tuple[str, str, str | None]:
    """Return text, finish reason and refusal of a new answer."""
    text = f"new answer [{number}] turn {turn} " + "word " * (number % 19)
    if number % 23 == 4:
        return text, "length", None
    if number % 29 == 6:
        return "", "stop", "I will not."
    # The client would ask again for what is empty.
    return ("<think>hm" if number % 31 == 8 else text), "stop", None


def turns_of(number: int) -> int:
    """Return the number of exchanges; every fifth row has several."""
    return 1 + number % 3 if number % 5 == 0 else 1


def row_of(number: int) -> dict[str, Any]:
    """Return a source row."""
    turns = []
    for turn in range(turns_of(number)):
        turns.append({"role": "user", "content": f"question [{number}] turn {turn} of the same kind?"})
        turns.append({"role": "assistant", "content": f"old answer {number}-{turn}." + " more" * (number % 7)})
    return {"messages": turns}


def number_in(text: str) -> int:
    """Return the row's number, the last one in brackets."""
    return int(re.findall(r"\[(\d+)\]", text)[-1])


async def answer(asked: Asked) -> Reply:
    """Reply to one request."""
    prompt = asked.prompt
    number, turn = number_in(prompt), int((re.findall(r"\[\d+\] turn (\d)", prompt) or ["0"])[-1])
    if prompt.startswith("The next conversation"):
        return said(case_of(number, asked.body["seed"] - SEED).written.replace("#", str(number)))
    if "Judge for each of the eight" in prompt:
        return said("\n".join(verdict_line(number, turn, tag) for tag in EIGHT))
    text, finish_reason, refusal = answer_of(number, turn)
    return said(text, finish_reason, refusal=refusal)


faulty = unreliable(answer)


@dataclass
class Expected:
    """Results expected for rows 0 to `count`, by a plain loop."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[tuple[int, str]] = field(default_factory=list)
    tags: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[tuple[str, str]] = field(default_factory=Counter)
    removed: Counter[tuple[str, str]] = field(default_factory=Counter)
    repairs: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    completion_tokens: Counter[str] = field(default_factory=Counter)
    old_characters: int = 0
    new_characters: int = 0

    def count(self, stage: str, text: str) -> None:
        self.requests[stage] += 1
        self.completion_tokens[stage] += len(text.split())


def expected(count: int, retries: int = 2) -> Expected:
    """Compute the results for the default settings with `generate.seed: SEED`."""
    result = Expected()
    for number in range(count):
        message: list[tuple[str, str]] = []
        reason = ""
        for sample in range(1 + retries):
            case = case_of(number, sample)
            result.count("generate", case.written)
            phrases = [(tag, text.replace("#", str(number))) for tag, text in case.kept]
            reason = "no valid phrase"
            if case.written.startswith("<think>"):
                reason = "system message without an end to its reasoning"
            verdicts: list[dict[str, str | None]] = []
            if phrases:
                for turn in range(turns_of(number)):
                    result.count("verify", "\n".join(verdict_line(number, turn, tag) for tag in EIGHT))
                    verdicts.append({tag: verdict_of(number, turn, tag) for tag in EIGHT})
                reason = "no phrase was verified"
            message = []
            removed: Counter[tuple[str, str]] = Counter()
            for tag, text in phrases:
                verdicts_on_tag = [verdicts_of_turn[tag] for verdicts_of_turn in verdicts]
                for verdict in ("Bad", "None"):
                    if verdict in verdicts_on_tag and (verdict == "Bad" or "Good" not in verdicts_on_tag):
                        removed[tag, f"judged {verdict}"] += 1
                        break
                else:
                    message.append((tag, text))
            if message:
                reason = ""
                break
        # The report covers the last try of a row.
        for verdicts_of_turn in verdicts:
            result.verdicts.update((tag, verdict or "missing") for tag, verdict in verdicts_of_turn.items())
        result.removed += removed
        result.repairs.update(case.repairs)
        result.dropped.update(case.dropped)
        result.unknown.update(case.unknown)
        if reason:
            result.left_out.append((number, reason))
            continue
        turns: list[dict[str, str]] = [{"role": "system", "content": " ".join(text for _, text in message)}]
        source = row_of(number)["messages"]
        for turn in range(turns_of(number)):
            text, finish_reason, refusal = answer_of(number, turn)
            result.count("answer", text)
            if refusal or finish_reason == "length" or text.startswith("<think>"):
                reason = "refused" if refusal else "cut at the token limit"
                reason = "without an end to its reasoning" if text.startswith("<think>") else reason
                break
            turns += [source[2 * turn], {"role": "assistant", "content": text}]
        if reason:
            result.left_out.append((number, f"new answer {reason}"))
            continue
        result.rows.append(
            {"number": number, "messages": turns, "tags": list(dict.fromkeys(tag for tag, _ in message))}
        )
        result.tags.update(result.rows[-1]["tags"])
        result.old_characters += sum(len(turn["content"]) for turn in source[1::2])
        result.new_characters += sum(len(turn["content"]) for turn in turns[2::2])
    return result


def write_rows(path: Any, count: int) -> None:
    """Write the source rows as JSON lines."""
    path.write_text("".join(json.dumps(row_of(number)) + "\n" for number in range(count)), encoding="utf-8")
