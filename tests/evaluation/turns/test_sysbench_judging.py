"""The judge of SysBench: its question, its verdicts, and repeated requests."""

import asyncio
import json

import pytest

from train.evaluation.turns.sysbench_judging import NO_VERDICT, judge_answer, judge_prompt, parse_verdicts
from train.llm.failures import RequestFailed
from train.llm.judgement import Judgement
from train.llm.request import Answer, Decoding, Request

MESSAGES = [
    {"role": "system", "content": "Zebra."},
    {"role": "user", "content": "Lion?"},
    {"role": "assistant", "content": "Gnu."},
    {"role": "user", "content": "Okapi?"},
]
YES_NO = '{"reasons": "1 yes, 2 no", "verdicts": {"1": "yes", "2": "no"}}'


@pytest.mark.parametrize(
    ("reply", "verdicts"),
    [
        (YES_NO, (True, False)),
        (f"```json\n{YES_NO}\n```", (True, False)),
        (f"Let me see.\n{YES_NO}\n", (True, False)),
        ('{"verdicts": {"2": "No.", "1": "YES"}}', (True, False)),
        ('{"verdicts": {"1": true, "2": false}}', (True, False)),
        ('{"评判理由": "…", "verdicts": {"1": "是", "2": "否"}}', (True, False)),
        ("1: yes\n2: no", (True, False)),
        ("1. Yes\n2. No", (True, False)),
        ("- **Criterion 1**: yes\n- **Criterion 2**: no, it is too long", (True, False)),
        ("The answer is short.\n\n1) yes\n2) no", (True, False)),
        ("1：是\n2：否", (True, False)),
        ("1. The answer has a title.\n2. No title is needed.\n\n1: yes\n2: yes", (True, True)),
    ],
)
def test_a_reply_that_answers_every_criterion_has_a_verdict(reply: str, verdicts: tuple[bool, ...]) -> None:
    assert parse_verdicts(reply, 2) == verdicts


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "yes",
        "yes, no",
        "1: yes",
        "1: yes\n2: perhaps",
        "1: yes\n2: no\n3: yes",
        "1: yes\n2: no\n2: yes",
        "1: yes or no\n2: no",
        '{"verdicts": {"1": "yes"}}',
        '{"verdicts": {"1": "yes", "2": "no", "3": "no"}}',
        '{"verdicts": {"1": "yes", "2": "partly"}}',
        '{"verdicts": {"1": "yes", "2": null}}',
        '{"verdicts": {"1": "yes", "2": "no", "2": "yes"}}',
        '{"verdicts": {"one": "yes", "two": "no"}}',
        '{"verdicts": ["yes", "no"]}',
        '{"verdicts": "yes"}',
        '{"1": "yes", "2": "no"}',
        f"{YES_NO} or rather no",
        YES_NO[:-1],
    ],
)
def test_a_reply_that_misses_or_contradicts_a_criterion_has_none(reply: str) -> None:
    assert parse_verdicts(reply, 2) is None


def test_the_judge_sees_everything_that_the_criteria_are_about() -> None:
    prompt = judge_prompt(MESSAGES, "Kudu.", ["It is brief.", "It has {braces}."])
    positions = [prompt.index(text) for text in ("Zebra.", "Lion?", "Gnu.", "Okapi?", "Kudu.", "1. It is brief.")]
    assert positions == sorted(positions)
    assert "2. It has {braces}." in prompt
    example = json.loads(prompt.splitlines()[-1])
    assert list(example["verdicts"]) == ["1", "2"]
    assert parse_verdicts(prompt, 2) is None  # a judge that repeats the question gives no verdict


class ScriptedJudge:
    """A judge that gives these replies one after another and records the requests."""

    def __init__(self, *replies: str | Answer | Exception) -> None:
        self.replies, self.asked = list(replies), list[Request]()

    async def ask(self, request: Request) -> Answer:
        self.asked.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return Answer(reply, "stop", None, 10, 2, 0.1) if isinstance(reply, str) else reply


def judged(judge: ScriptedJudge, temperature: float | None = 0.0, retries: int = 3) -> Judgement[tuple[bool, ...]]:
    decoding = Decoding(100, temperature=temperature)
    return asyncio.run(judge_answer(judge, decoding, retries, MESSAGES, "Kudu.", ["a", "b"]))


def test_a_reply_without_a_verdict_is_asked_for_again() -> None:
    cut = Answer(YES_NO, "length", None, 10, 2, 0.1)
    judge = ScriptedJudge("hm", cut, YES_NO)
    judgement = judged(judge)
    assert (judgement.verdict, judgement.missing) == ((True, False), None)
    assert judgement.errors == (NO_VERDICT, "cut at the token limit")
    assert judgement.tokens == {"prompt": 30, "completion": 6}
    assert [request.sample for request in judge.asked] == [0, 1, 2]
    assert len({request.messages[0]["content"] for request in judge.asked}) == 1


def test_a_verdict_that_never_comes_is_missing() -> None:
    judgement = judged(ScriptedJudge("hm", "1: yes", "", "2: no"))
    assert (judgement.verdict, judgement.missing, len(judgement.texts)) == (None, "unparsable", 4)
    judgement = judged(ScriptedJudge("hm", RequestFailed("too long")))
    assert (judgement.verdict, judgement.missing, judgement.detail) == (None, "no answer", "too long")
    refusal = Answer("", "content_filter", None, 10, 0, 0.1)
    assert judged(ScriptedJudge(refusal, refusal), retries=1).missing == "refused"


def test_a_greedy_judge_samples_in_the_second_half_of_the_tries() -> None:
    for retries, temperatures in ((0, [0]), (1, [0, 0.5]), (3, [0, 0, 0.5, 0.5]), (4, [0, 0, 0, 0.5, 0.5])):
        judge = ScriptedJudge(*["hm"] * (retries + 1))
        judged(judge, retries=retries)
        assert [request.decoding.temperature for request in judge.asked] == temperatures
    for temperature in (None, 0.7):
        judge = ScriptedJudge(*["hm"] * 4)
        judged(judge, temperature)
        assert {request.decoding.temperature for request in judge.asked} == {temperature}


def test_reasoning_of_the_judge_holds_no_verdict() -> None:
    assert judged(ScriptedJudge(f"<think>1: no\n2: no</think>{YES_NO}")).verdict == (True, False)
