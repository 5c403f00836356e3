"""The judge of SysBench: one request for each answer, a yes or no for each criterion.

- The judge gets the system message, the history that the model saw, the user turn, the answer and the criteria, in one
  user message of our own wording. SysBench's is Chinese and not ours to ship; scores under the two differ.
- A reply has a verdict if it answers every criterion, no other, and none both ways: as JSON, or one line for each.
- A reply without a verdict is asked for again, up to `retries` times. In the second half of the tries a greedy judge
  samples at RETRY_TEMPERATURE, as in SysBench's own code, since it would repeat itself.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from train.llm.json_replies import json_at_end
from train.llm.judgement import JudgeClient, Judgement, judge
from train.llm.request import Decoding, Request
from train.llm.yes_or_no import says_no

Verdicts = tuple[bool, ...]
"""For each criterion, True if the answer meets it."""

STAGE = "judge of sysbench"
NO_VERDICT = "no verdict on every criterion"
"""The error of a reply that is complete."""
REMEDIES = {NO_VERDICT: "Use a judge that replies with the JSON object that it is asked for."}
"""Advice on such replies."""
RETRY_TEMPERATURE = 0.5

PROMPT_VERSION = 1
"""Version of the judge's prompt. Raise it with every change of wording: figures under two wordings are not
comparable."""

_TASK = """\
You check one answer of a language model against a list of criteria.

You are given the system message that the model received, the conversation so far, the user's latest message and the \
model's answer to it. Judge the latest answer alone, each criterion by itself and strictly by its wording. A criterion \
is met only if the whole answer meets it."""

_FORMAT = """\
Reply with one JSON object and nothing after it. First say in a few words for each criterion why it is met or not, \
then give the verdicts: "yes" if the criterion is met, "no" if it is not.
{{"reasons": "...", "verdicts": {{{verdicts}}}}}"""

_LINE = re.compile(r"\W*(?:criterion\s+)?(\d{1,3})\s*[*_\"]*\s*[.:)=、：）-]\s*(.+)", re.IGNORECASE)
"""A line with the number of a criterion and a verdict: `1: yes`, `2. no`, `- **Criterion 3**: yes`."""
_YES, _NO = ("yes", "是", "true"), ("no", "否", "false")


def judge_prompt(messages: Sequence[Mapping[str, Any]], answer: str, criteria: Sequence[str]) -> str:
    """Return the question for the judge. `messages`: system message, history and the latest user turn."""
    system, *history, latest = messages
    numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(criteria, 1))
    verdicts = ", ".join(f'"{number}": "yes or no"' for number in range(1, len(criteria) + 1))
    parts = [_TASK, f"### System message\n{system['content']}"]
    parts += [f"### Earlier in the conversation, {message['role']}\n{message['content']}" for message in history]
    parts += [
        f"### The user's latest message\n{latest['content']}",
        f"### The answer to be checked\n{answer}",
        f"### Criteria\n{numbered}",
        _FORMAT.format(verdicts=verdicts),
    ]
    return "\n\n".join(parts)


def parse_verdicts(text: str, count: int) -> Verdicts | None:
    """Return the verdicts on criteria 1 to `count`; None if one is missing, contradicted, or about no criterion."""
    record = json_at_end(text)
    if record is not None:
        given = record.get("verdicts")
        pairs = [(str(key), _verdict(value)) for key, value in given.items()] if isinstance(given, dict) else []
    else:
        matches = [match for line in text.splitlines() if (match := _LINE.fullmatch(line.strip()))]
        pairs = [(match[1], met) for match in matches if (met := _met(match[2])) is not None]
    verdicts = dict(pairs)
    if any(verdicts[number] is not met for number, met in pairs) or None in verdicts.values():
        return None
    if set(verdicts) != {str(number) for number in range(1, count + 1)}:
        return None
    return tuple(verdicts[str(number)] is True for number in range(1, count + 1))


def _verdict(value: object) -> bool | None:
    """Return the verdict in a value of JSON; None for anything but a yes or no."""
    word = str(value).strip(" .!。").casefold()
    return True if word in _YES else False if word in _NO else None


def _met(text: str) -> bool | None:
    """Return the verdict in the text of a line."""
    if (verdict := _verdict(text)) is not None:
        return verdict
    unmet = says_no(text)
    return None if unmet is None else not unmet


async def judge_answer(
    client: JudgeClient,
    decoding: Decoding,
    retries: int,
    messages: Sequence[Mapping[str, Any]],
    answer: str,
    criteria: Sequence[str],
) -> Judgement[Verdicts]:
    """Ask about one answer, again if a reply has no verdict on every criterion. Raises UserError.

    Args:
        client: the judge.
        decoding: its sampling settings.
        retries: maximum number of repeated requests.
        messages: system message, history and the latest user turn.
        answer: the answer to the latest user turn.
        criteria: text of each criterion.
    """
    prompt = [{"role": "user", "content": judge_prompt(messages, answer, criteria)}]
    tries = [Request(STAGE, prompt, decoding, sample) for sample in range(retries + 1)]
    if decoding.temperature == 0:
        half = (len(tries) + 1) // 2
        sampled = replace(decoding, temperature=RETRY_TEMPERATURE)
        tries[half:] = [replace(request, decoding=sampled) for request in tries[half:]]
    return await judge(client, tries, lambda text: parse_verdicts(text, len(criteria)), no_verdict=NO_VERDICT)
