"""The judge: the score at the end of a text, and the contents of the prompt."""

import asyncio
import hashlib
import json
import subprocess
import sys

import pytest
from external_data import ABSENT, FOLDER
from hypothesis import given
from hypothesis import strategies as st

from train.llm.failures import RequestFailed
from train.llm.judgement import PendingError
from train.llm.request import Answer, Request
from train.multifaceted.bench.judging import PROMPT_VERSION, judge_prompt, judge_rubric
from train.multifaceted.bench.protocol import JudgeSettings
from train.multifaceted.bench.rows import BenchRow, Rubric
from train.multifaceted.judge import parse_score

CASES = FOLDER / "janus" / "judge_parse_cases.json"
ROW = BenchRow(
    "r",
    "here",
    "s",
    "Zebra system",
    "The instruction {x}",
    "An exemplary reply",
    (Rubric("Is it so?", tuple("abcde"), "d"),),
)


@pytest.mark.skipif(not CASES.is_file(), reason=ABSENT)
def test_the_published_cases() -> None:
    cases = json.loads(CASES.read_text("utf-8"))
    assert len(cases) == 19
    assert [parse_score(case["output"]) for case in cases] == [case["score"] for case in cases]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        # twins of the published cases
        ("Fine work. [RESULT] 3", 3),
        ("It lacks much. [RESULT] Score: 2", 2),
        ("Nicely put. [RESULT] Result: 4", 4),
        ("So so. [RESULT] 4/5", 4),
        ("Splendid. [RESULT] 5 out of 5", 5),
        ("A poor one. [RESULT] score of 1", 1),
        ("Fine work. [Result] 3", 3),
        ("So so. [result] 4/5", 4),
        ("Fine work. [3]", 3),
        ("Fine work. (Score 5)", 5),
        ("Fine work. [Score 4]", 4),
        ("Fine work. score: 3", 3),
        ("Fine work. Score: 3", 3),
        ("A poor one. score of 1", 1),
        ("Fine work. [RESULT] (5)", 5),
        # marks around it
        ("[RESULT] **4**", 4),
        ("**[RESULT]** 4", 4),
        ("**[RESULT] 4**", 4),
        ("[RESULT]: 4", 4),
        ("[RESULT] = 4.", 4),
        ("[RESULT]\n\n4\n", 4),
        ("[RESULT] The final score is **4/5**.", 4),
        ("[RESULT] 4 / 5", 4),
        ("[RESULT] five", None),
        ("Score: 3/5", 3),
        ("**Score: 4**", 4),
        # what follows the score
        ("[RESULT] 2\n\n1. The tone is off.", 2),
        ("[RESULT] 2. The tone is off.", 2),
        ("[RESULT] 2 because the tone is off", 2),
        # the last one wins, whatever it is
        ('The answer says "[RESULT] 5", which is none. [RESULT] 2', 2),
        ("[RESULT] 5 [RESULT] 10", None),
        ("[RESULT] 5 I was asked for [RESULT]", None),
        ("Score: 3 [RESULT] n", None),
        ("It ends in [RESULT] (a whole number from 1 to 5)", None),
        # no score from 1 to 5
        ("[RESULT] 10", None),
        ("[RESULT] 45", None),
        ("[RESULT] 0", None),
        ("[RESULT] 6", None),
        ("[RESULT] -4", None),
        ("[RESULT] 4.5", None),
        ("[RESULT] 4,5", None),
        ("[RESULT] 4½", None),
        ("[RESULT] 4²", None),
        ("[RESULT] 4+", None),
        ("[RESULT] 80%", None),
        ("[RESULT] 4%", None),
        ("[RESULT] 4-5", None),
        ("[RESULT] 3–4", None),
        ("[RESULT] 4 or 5", None),
        ("[RESULT] 4 to five", None),
        ("[RESULT] 4/10", None),
        ("[RESULT] 5 out of 10", None),
        ("[RESULT] 4/5.5", None),
        ("[RESULT] 4th", None),
        # digits of other scripts
        ("[RESULT] ４", None),
        ("[RESULT] ٣", None),
        ("[RESULT] 4５", None),
        ("[RESULT] ④", None),
        # without a tag only the end counts
        ("A score of 5 would need an example.", None),
        ("Nothing here deserves a score of 4 for tone.", None),
        ("An example is missing, which keeps it from a score of 5.", None),
        ("It doesn't earn a score of 5.", None),
        ("I give this a score of 3.", 3),
        ("score: 3 or 4", None),
        ("Score: 7", None),
        ("as in [1][3]", None),
        ("it prints words[3]", None),
        ("[10]", None),
        ("4", None),
        ("", None),
        ("[RESULT", None),
    ],
)
def test_the_score_at_the_end_of_a_text(text: str, score: int | None) -> None:
    assert parse_score(text) == score


PIECES = ["[RESULT]", "[result]", "[", "]", "(", ")", " ", "\n", "score", "Score of", ":", "/5", " out of 5", "*", "."]
NUMBERS = ["1", "2", "3", "4", "5", "0", "6", "10", "4.5", "٣", "²", "-1"]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES + NUMBERS), max_size=12).map("".join)))
def test_no_text_raises_and_every_score_is_from_one_to_five(text: str) -> None:
    assert parse_score(text) in (None, 1, 2, 3, 4, 5)


@given(st.text(), st.sampled_from("12345"))
def test_a_text_with_the_requested_ending_has_its_score(before: str, grade: str) -> None:
    assert parse_score(f"{before}\n[RESULT] {grade}") == int(grade)


def test_long_texts_of_brackets_take_no_time() -> None:
    for piece in ("[RESULT] ", "[", "score of ", "[RESULT] " + "*" * 50, "((((", "\n" * 10):
        parse_score(piece * 20_000)


def test_the_judges_prompt_is_complete_and_has_no_system_message() -> None:
    prompt = judge_prompt(ROW, ROW.rubrics[0], "The response {y} %s")
    for part in (
        "The instruction {x}",
        "The response {y} %s",
        "An exemplary reply",
        "Is it so?",
        "1: a\n2: b\n3: c\n4: d\n5: e",
    ):
        assert prompt.count(part) == 1
    assert "Zebra" not in prompt
    assert "Zebra system" in judge_prompt(ROW, ROW.rubrics[0], "r", show_system=True)
    assert parse_score(prompt) is None  # a judge that repeats its question has graded nothing


@pytest.mark.parametrize(
    "sentence",
    [
        "You grade one answer",
        "on a single criterion",
        "a reference answer that would earn the highest score",
        "a description of each score from 1 to 5",
        "First explain in a few sentences which description fits",
        "Then give the score on a final line in this form, [RESULT] followed by the number alone",
        "\n[RESULT] (a whole number from 1 to 5)\n",
    ],
)
def test_the_prompt_asks_for_everything_that_the_paper_asks_for(sentence: str) -> None:
    assert sentence in judge_prompt(ROW, ROW.rubrics[0], "r")


def test_a_new_wording_needs_a_new_version() -> None:
    """When this fails, raise PROMPT_VERSION and write the new digest here: scores of two wordings stay apart."""
    both = "".join(judge_prompt(ROW, ROW.rubrics[0], "r", show_system=shown) for shown in (True, False))
    assert (PROMPT_VERSION, hashlib.blake2b(both.encode(), digest_size=8).hexdigest()) == (2, "81144bfb42aaad7a")


def test_judging_imports_no_torch() -> None:
    modules = "train.multifaceted.bench.report, train.multifaceted.bench.batch_api, train.multifaceted.bench.pairwise"
    code = f"import sys, {modules}\nprint(sorted({{'torch', 'transformers', 'datasets', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


class ScriptedReply:
    """A judge client that gives these answers one after another and records the requests."""

    def __init__(self, *answers: Answer | Exception) -> None:
        self.answers, self.asked = list(answers), list[Request]()

    async def ask(self, request: Request) -> Answer:
        self.asked.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def answer(text: str, finish_reason: str = "stop", refusal: str | None = None) -> Answer:
    return Answer(text, finish_reason, refusal, 10, 2, 0.1)


def judge(asker: ScriptedReply, **settings: int):
    return asyncio.run(judge_rubric(asker, JudgeSettings("j", **settings), ROW, ROW.rubrics[0], "r", 1))


def test_reasoning_is_not_searched_for_a_score() -> None:
    judgement = judge(ScriptedReply(answer("<think>[RESULT] 5 or so</think>It is weak. [RESULT] 2")))
    assert judgement.verdict == 2
    asker = ScriptedReply(answer("<think>I lean to [RESULT] 5"), answer("[RESULT] 1"))
    judgement = judge(asker)
    assert (judgement.verdict, judgement.errors) == (1, ("without an end to its reasoning",))
    assert len(asker.asked) == 2
    for text in (
        "Hm, [RESULT] 5?</think>Weak. [RESULT] 2<|im_end|>",
        "analysisWe see [RESULT] 5.assistantfinal[RESULT] 2",
    ):
        assert judge(ScriptedReply(answer(text))).verdict == 2


def test_a_cut_or_refused_answer_is_requested_again_as_another_sample() -> None:
    asker = ScriptedReply(
        answer('It says "[RESULT] 5', "length"), answer("[RESULT] 4", refusal="no"), answer("hm"), answer("[RESULT] 3")
    )
    judgement = judge(asker, retries=3)
    assert (judgement.verdict, judgement.missing) == (3, None)
    assert judgement.errors == ("cut at the token limit", "refused", "no score at its end")
    assert [request.sample for request in asker.asked] == [0, 1, 2, 3]
    assert {request.stage for request in asker.asked} == {"judge, run 2"}
    assert judgement.tokens == {"prompt": 40, "completion": 8}


def test_a_missing_score_has_a_reason() -> None:
    assert judge(ScriptedReply(answer("a"), answer("b")), retries=1).missing == "unparsable"
    judgement = judge(ScriptedReply(answer("a"), RequestFailed("too long")), retries=1)
    assert (judgement.verdict, judgement.missing, judgement.detail, judgement.texts) == (
        None,
        "no answer",
        "too long",
        ("a",),
    )
    assert judge(ScriptedReply(PendingError())).missing == "pending"
