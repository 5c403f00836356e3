"""Language detection on our own texts in 26 languages."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.datagen.language import detect_language

SAMPLES = [
    json.loads(line) for line in (Path(__file__).parent / "language_samples.jsonl").read_text("utf-8").splitlines()
]
DETECTED = [(sample, detect_language(sample["text"])) for sample in SAMPLES]
"""kind: a system message, a question, a text with pieces in another language or code, or a text without a language."""

LONG_GERMAN = (
    "Die Wärmepumpe entzieht der Außenluft Wärme und gibt sie an das Wasser der Heizung ab. Dafür braucht sie Strom. "
) * 60


def test_no_language_is_detected_wrong() -> None:
    wrong = [
        (detected, sample)
        for sample, detected in DETECTED
        if detected and sample["language"] not in detected.split("/")
    ]
    assert wrong == []


def test_a_correct_message_is_never_stopped() -> None:
    """Each system message with each question in its language: 1,000 pairs without two different languages."""
    by_language: dict[tuple[str, bool], list[str | None]] = {}
    for sample, detected in DETECTED:
        by_language.setdefault((sample["language"], sample["kind"] == "system"), []).append(detected)
    pairs = [
        pair
        for (language, is_system), messages in by_language.items()
        if is_system
        for pair in itertools.product(messages, by_language[language, False])
    ]
    assert len(pairs) > 1000
    assert [pair for pair in pairs if all(pair) and pair[0] != pair[1]] == []


def test_the_language_of_two_sentences_is_mostly_detected() -> None:
    long = [
        detected for sample, detected in DETECTED if sample["kind"] == "system" and len(sample["text"].encode()) > 60
    ]
    assert len(long) > 50
    assert sum(detected is not None for detected in long) / len(long) > 0.9


def test_code_numbers_and_single_words_have_no_language() -> None:
    assert [sample["text"] for sample, detected in DETECTED if sample["kind"] == "none" and detected] == []


@pytest.mark.parametrize(("text", "language"), [
    ("Answer in short and simple sentences, please.", "en"),
    ("ANSWER IN SHORT AND SIMPLE SENTENCES, PLEASE.", "en"),
    ("Why does this fail?\n\n```python\nfür_alle(kunden)\n```\nI see no reason for it.", "en"),
    ("What is the meaning of „Ich habe heute leider gar keine Zeit für dich und auch morgen nicht“?", "en"),
    ("If $n$ is odd, show that $\\gcd(n, 2) = 1$ and explain what follows from it.", "en"),
    ("Erkläre mir bitte den Unterschied zwischen Liste und Tupel.", "de"),
    ("Forklar hvert steg med enkle ord, og avslutt med svaret på en egen linje.", "da/no"),
    ("Forklar hvert trin med enkle ord, og slut af med svaret på en linje for sig.", "da/no"),
    ("Objasni svaki korak jednostavnim riječima i završi rezultatom u zasebnom retku.", "bs/hr/sr"),
    ("Објасни сваки корак једноставним речима и заврши резултатом у посебном реду.", "bs/hr/sr"),
    ("请用简单的语言解释每一步，最后写出结果。", "zh"),
    ("各ステップを簡単な言葉で説明し、最後に結果を書いてください。", "ja"),
])  # fmt: skip
def test_a_language_has_its_iso_code(text: str, language: str) -> None:
    assert detect_language(text) == language


@pytest.mark.parametrize("text", [
    "Translate into English: Ich habe heute leider keine Zeit für dich.",
    "Ich habe heute leider keine Zeit für dich. Translate this into English, please.",
    "Translate this into English, please:\n\n" + LONG_GERMAN,
    LONG_GERMAN + "\n\nTranslate this into English, please.",
    "What do 你好 and 谢谢 mean?",
    "翻译：The weather is nice today and we are going to the park.",
    "令和六年度東京都予算案概要",  # Japanese in Chinese characters alone
    "日本国憲法第九条",
])  # fmt: skip
def test_texts_in_two_languages_have_none(text: str) -> None:
    assert detect_language(text) is None


def test_the_language_of_a_long_text_is_detected() -> None:
    assert detect_language(LONG_GERMAN) == "de"


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(), max_size=300))
@example("`" * 5000)
@example('"' * 5001)
@example("\\[" * 5000)
def test_any_text_has_a_language_or_none(text: str) -> None:
    detected = detect_language(text)
    assert detected is None or all(2 <= len(code) <= 3 and code.isalpha() for code in detected.split("/"))
