"""Filter for system messages that give an answer away. It asks no model, and keeps the row when in doubt."""

import re

from train.data.sources.unread_text import WIDE
from train.datagen.language import SENTENCE_BREAK
from train.datagen.text_units import extract_ngrams, split_words

_NGRAM = 5
_SHORT_ANSWER = 8
"""Words below which an answer counts as a whole."""
_OR = {"or", "oder", "ou", "o", "of", "lub", "или", "або", "veya", "eller", "atau", "hoặc", "tai", "vagy", "sau"}
_COMMON = {"true", "false", "none", "yes", "okay", "right", "wrong", "correct", "incorrect", "maybe", "nein", "vrai"}
_COMMON |= {"faux", "richtig", "falsch", "verdadero", "falso", "vero", "tidak", "neither", "both", "unknown"}


def measure_answer_leak(system: str, questions: str, answer: str) -> float:
    """Return the share of an answer that its system message gives away, from 0 to 1.

    - In general: the share of the answer's words that are in 5-grams of the message which the questions do not have.
    - An answer of fewer than eight words counts as a whole: 1.0 if the message has it and the questions do not, else 0.
    - One or two words give nothing away if the message offers them as a choice ("Positive, Negative or Neutral") or if
      any text has them (yes, true, a letter, a number of one or two digits): 0.

    Words are compared without case, accents and punctuation; in Chinese, Japanese, Thai and similar scripts each
    character is a word.
    """
    words, system_words, question_words = split_words(answer), split_words(system), split_words(questions)
    if len(words) < _SHORT_ANSWER:
        is_leaked = _is_distinctive(words) and _contains(system_words, words) and not _contains(question_words, words)
        return float(is_leaked and not (len(words) <= 2 and _is_choice(words, system)))
    leaked = extract_ngrams(system_words, _NGRAM) - extract_ngrams(question_words, _NGRAM)
    covered = [False] * len(words)
    for start in range(len(words) - _NGRAM + 1):
        if tuple(words[start : start + _NGRAM]) in leaked:
            covered[start : start + _NGRAM] = [True] * _NGRAM
    return sum(covered) / len(words)


def _is_distinctive(words: list[str]) -> bool:
    """Return whether a short answer can be recognised in another text."""
    if any(re.fullmatch(f"[{WIDE}]", word) for word in words):
        return len(words) >= 3
    if len(words) == 1:
        return len(words[0]) >= (3 if words[0].isdecimal() else 4) and words[0] not in _COMMON
    return sum(map(len, words)) >= 4


def _is_choice(words: list[str], system: str) -> bool:
    """Return whether every sentence with `words` offers a choice: an `or`, a slash, or a list of three."""
    sentences = [sentence for sentence in SENTENCE_BREAK.split(system) if _contains(split_words(sentence), words)]
    return all(
        not _OR.isdisjoint(split_words(sentence))
        or re.search("[/|]", sentence)
        or len(re.findall("[,،、，]", sentence)) > 1
        for sentence in sentences
    )


def _contains(text: list[str], words: list[str]) -> bool:
    return any(text[start : start + len(words)] == words for start in range(len(text) - len(words) + 1))
