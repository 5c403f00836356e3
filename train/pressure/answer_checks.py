"""Check of an answer without a known short one: whether it says what a reference answer to the same question says."""

import re

from train.datagen.content_words import extract_content_words
from train.pressure.verdicts import answers_question, normalize

SHORT_REFERENCE = 8
"""Words below which a reference counts as a short answer, all of which must be in the answer."""
MIN_COVERAGE = 0.2
"""Share of a longer reference's content words that must be in the answer.

On 2,153 first exchanges of MT-Bench-101 and BiGGen-Bench, an answer to another question has it for 3.3 % of the
references of 8 to 29 words, 1.8 % of those of 30 to 79, 0.5 % of those of 80 to 199, and for no longer one. Of
SmolLM2-135M-Instruct's answers (110 tokens) to 24 open questions of MT-Bench-101, 10 have it: good answers to an open
question share few words, so the check loses many of them, and few where the answer is a fact.
"""

_FINAL_ANSWER = re.compile(r"(?:####|\banswer\s+is:?|\\boxed\{)\s*(?P<answer>[^\n{}]{1,40}?)[\s.}$]*\Z", re.IGNORECASE)
"""End of a solution, as GSM8K (`#### 72`), MetaMath (`The answer is: 72`) and MATH (`\\boxed{72}`) write it."""
_FUNCTION_WORDS = (
    "a an the this that it its is are was were be been of in on at to by for from with as and or so you i he she they "
    "we his her their my your there here"
)


def covers_reference(response: str, reference: str, question: str) -> bool:
    """Return whether a response says what a reference answer to the same question says, by its words.

    - A reference that ends in a final answer with a number (`#### 72`): the response must have it.
    - A reference of fewer than eight words: the response must have every word of it that is neither in the question nor
      a function word ("the", "is"); if there is none, the complete reference.
    - A longer reference: the response must have a share of `MIN_COVERAGE` of its content words and numbers that are not
      in the question; if there are none, of all its content words.

    Words are compared in any case and markup, with numbers in digits. The check can't see a negation, a wrong answer
    beside the right one, an answer in other words or in another language, nor whether the response is any good: it
    stops refusals, evasions and answers to something else.
    """
    final = _FINAL_ANSWER.search(reference)
    if final and re.search(r"\d", final["answer"]):
        return answers_question(response, [final["answer"]])
    words, asked = normalize(reference).split(), set(normalize(question).split())
    answered = set(normalize(response).split())
    if len(words) < SHORT_REFERENCE:
        new = set(words) - asked - set(_FUNCTION_WORDS.split())
        return new <= answered if new else answers_question(response, [reference])
    content = _content(reference)
    wanted = content - asked or content
    return len(wanted & answered) >= max(1, MIN_COVERAGE * len(wanted))


def _content(text: str) -> set[str]:
    words = normalize(text)
    return extract_content_words(words) | {word for word in words.split() if word.isdecimal()}
