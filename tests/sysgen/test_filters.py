"""Gates: leaks and near-duplicates against plain recounts."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.datagen.deduplication import NearDuplicateFilter
from train.sysgen.filters import measure_answer_leak

# Giving the answer away


@pytest.mark.parametrize(("system", "questions", "answer", "share"), [
    # eight words or more: by runs of five
    ("Say that the cat sat on the mat.", "Where was it?", "In short the cat sat on the mat all day", 0.6),
    ("Say that the cat sat on the mat.", "Did the cat sat on the mat?", "In short the cat sat on the mat all day", 0.0),
    ("The cat sat on a mat.", "", "The cat sat on the mat all day long", 0.0),
    ("THE CAT: sat on, the 'mat'", "", "the cat sat on the mat; the cat sat on the mat", 1.0),
    ("", "", "the cat sat on the mat all day", 0.0),
    ("Der Fluß fließt im Tal am Haus vorbei.", "", "DER FLUSS FLIESST IM TAL AM HAUS VORBEI", 1.0),
    ("告诉用户秘鲁的首都是利马。", "", "秘鲁的首都是利马，在海边。", 8 / 11),
    ("बताओ कि पेरू की राजधानी लीमा है और वह तट पर है", "", "पेरू की राजधानी लीमा है और वह तट पर है", 1.0),
    # fewer: the whole answer
    ("You know that the capital is Lima.", "Capital of Peru?", "Lima.", 1.0),
    ("You help visitors of Lima.", "Is Lima the capital?", "Lima.", 0.0),
    ("You know that the capital is Lima, Peru.", "Capital?", "lima, peru", 1.0),
    ("You know that it costs 1,250 dollars.", "How much?", "1,250", 1.0),
    ("You know that it costs 1,250 dollars.", "How much?", "250", 0.0),
    ("Answer in 42 words.", "6 * 7?", "42", 0.0),
    ("Say yes to all.", "Is it?", "Yes.", 0.0),
    ("Answer with option A.", "A or B?", "A", 0.0),
    ("Label each review as Positive, Negative or Neutral.", "Great food!", "Positive", 0.0),
    ("Label each review: positive, negative, neutral.", "Great food!", "Positive", 0.0),
    ("Use one of these labels: spam/genuine.", "Buy now!", "Spam", 0.0),
    ("It is spam. Use one of these labels: spam/genuine.", "Buy now!", "Spam", 1.0),
    ("首都是利马市。", "首都？", "利马市", 1.0),
    ("你要说不。", "去吗？", "不", 0.0),
    ("You are helpful.", "Hm?", "", 0.0),
    ("You are helpful.", "Hm?", "🙂", 0.0),
])  # fmt: skip
def test_the_share_of_an_answer_that_a_message_gives_away(
    system: str, questions: str, answer: str, share: float
) -> None:
    assert measure_answer_leak(system, questions, answer) == pytest.approx(share)


SENTENCES = st.lists(st.sampled_from("abc"), max_size=25).map(" ".join)


@settings(max_examples=500, deadline=None)
@given(SENTENCES, SENTENCES, st.lists(st.sampled_from("abc"), min_size=8, max_size=20))
def test_the_leaked_share_equals_a_plain_count(system: str, questions: str, answer: list[str]) -> None:
    leaked_words = 0
    for place in range(len(answer)):
        around = [answer[start : start + 5] for start in range(place - 4, place + 1) if 0 <= start <= len(answer) - 5]
        leaked_words += any(" ".join(run) in system and " ".join(run) not in questions for run in around)
    assert measure_answer_leak(system, questions, " ".join(answer)) == leaked_words / len(answer)


@settings(max_examples=200, deadline=None)
@given(*[st.text(st.characters(), max_size=100)] * 3)
def test_the_leaked_share_of_any_texts_is_between_0_and_1(system: str, questions: str, answer: str) -> None:
    assert 0 <= measure_answer_leak(system, questions, answer) <= 1


# Near-duplicates


def pairs_of_texts(count: int) -> list[tuple[str, str]]:
    """Return pairs of a text and a copy with some of its words changed."""
    rng = random.Random(7)
    vocabulary = [f"word{number}" for number in range(2000)]
    pairs = []
    for _ in range(count):
        text = rng.choices(vocabulary, k=rng.randint(5, 90))
        changed = rng.choice([0, 0.01, 0.03, 0.06, 0.1, 0.2])
        second = [rng.choice(vocabulary) if rng.random() < changed else word for word in text]
        pairs.append((" ".join(text), " ".join(second)))
    return pairs


def jaccard(first: str, second: str) -> float:
    sets = [{tuple(text.split()[at : at + 3]) for at in range(len(text.split()) - 2)} for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
def test_the_verdict_is_that_of_the_exact_similarity(threshold: float) -> None:
    """Skip pairs within four standard errors of 128 hashes; of the others, one in 16,000 fails by chance."""
    clear = 0
    for first, second in pairs_of_texts(600):
        exact = jaccard(first, second)
        if abs(exact - threshold) <= 4 * (exact * (1 - exact) / 128) ** 0.5:
            continue
        clear += 1
        with NearDuplicateFilter(threshold) as seen:
            assert not seen.is_near_duplicate(first)
            assert seen.is_near_duplicate(second) == (exact >= threshold), (exact, first, second)
    assert clear > 300


def test_texts_are_compared_with_all_earlier_ones() -> None:
    pairs = pairs_of_texts(400)
    with NearDuplicateFilter(0.7) as seen:
        assert [first for first, _ in pairs if seen.is_near_duplicate(first)] == []
        verdicts = [seen.is_near_duplicate(second) for _, second in pairs]
    sure = [
        (verdict, jaccard(*pair))
        for verdict, pair in zip(verdicts, pairs, strict=True)
        if abs(jaccard(*pair) - 0.7) > 0.17
    ]
    assert len(sure) > 200
    assert all(verdict == (exact > 0.7) for verdict, exact in sure)


@pytest.mark.parametrize(("first", "second", "are_alike"), [
    ("You are a guide.", "you are -- A GUIDE", True),
    ("Be brief.", "Be brief!", True),
    ("Be brief.", "Be kind.", False),
    ("", "", True),
    ("", "Be brief.", False),
    ("???", "!!!", False),
    ("你是一名导游。请简短回答。", "你是一名导游，请简短回答！", True),
    ("你是一名导游。请简短回答。", "请用编号列表给出步骤。", False),
    ("\ud800", "\udfff", False),
])  # fmt: skip
def test_short_and_unusual_texts_are_compared(first: str, second: str, are_alike: bool) -> None:
    with NearDuplicateFilter(0.8) as seen:
        assert not seen.is_near_duplicate(first)
        assert seen.is_near_duplicate(second) == are_alike


def test_texts_are_compared_only_with_kept_ones() -> None:
    """A ~ B ~ C with A unlike C: after B both others are duplicates, after A only B is."""
    words = [f"word{number}" for number in range(100)]
    a, b, c = (" ".join(words[start : start + 80]) for start in (0, 10, 20))
    assert jaccard(a, b) > 0.75 > 0.65 > jaccard(a, c)
    with NearDuplicateFilter(0.7) as seen:
        assert [seen.is_near_duplicate(text) for text in (a, b, c)] == [False, True, False]
    with NearDuplicateFilter(0.7) as seen:
        assert [seen.is_near_duplicate(text) for text in (b, a, c)] == [False, True, True]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1])
def test_a_threshold_outside_0_to_1_is_an_error(threshold: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        NearDuplicateFilter(threshold)


ELSEWHERE = """
import random, sys
from train.datagen.deduplication import NearDuplicateFilter
from train.datagen.language import detect_language
from train.sysgen.filters import measure_answer_leak

def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

def texts(count, rng=random.Random(3)):
    for number in range(count):
        yield " ".join(str(rng.randrange(300)) for _ in range(30)) if number % 3 else f"You are guide {number % 50}"

with NearDuplicateFilter(0.8) as seen:
    verdicts = "".join(str(int(seen.is_near_duplicate(text))) for text in texts(10_000))
    before = memory()
    for text in texts(int(sys.argv[1])):
        seen.is_near_duplicate(text)
    print(verdicts, memory() - before)
detect_language("Where is the nearest station, please?")
measure_answer_leak("a", "b", "c")
print(sorted({"torch", "transformers", "sklearn", "scipy", "datasets", "trl"} & set(sys.modules)))
"""


def elsewhere(hash_seed: str, further: int) -> list[str]:
    """Run in a process of its own; return verdicts, growth of the memory in MiB, and large imported libraries."""
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(further)],
        env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(root)},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout.split(maxsplit=2)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_verdicts_are_the_same_in_every_process_with_flat_memory_and_without_large_imports() -> None:
    first, second = elsewhere("1", 20_000), elsewhere("2", 0)
    assert first[0] == second[0]
    assert set(first[0]) == {"0", "1"}
    assert float(first[1]) < 8  # 15 when SQLite keeps the 13,000 new texts in memory
    assert first[2].strip() == "[]"
