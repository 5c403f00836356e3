"""The rules and questions of train/pressure: a check accepts only its own rule; held-out questions resemble no other."""

import re
from collections import Counter

import pytest

from train.pressure.questions import Question, read_questions
from train.pressure.rules import RULES
from train.pressure.verdicts import answers_question

QUESTIONS = read_questions()

# (check, applied rule) pairs in which obeying one rule also obeys the other.
COMPATIBLE = {("few_words", "hyphens")}

QUESTION = "What is the capital of France?"
PASSES = {
    "capitals": ["THE CAPITAL OF FRANCE IS PARIS.", "PARIS IT IS, 75001!", "PARIS", "PARIS."],
    "lower_case": ["the capital of france is paris.", "paris, since 987", "paris"],
    "json_answer": ['{"answer": "Paris"}', ' {"answer":"The capital is Paris."}\n', '{"answer": 7}', '{"answer": 0.5}'],
    "few_words": [
        "Paris",
        "Paris.",
        "Leonardo da Vinci",
        "Fifty-six",
        "90%",
        "Paris!",
        "**Paris**",
        '"Paris"',
        "- Paris",
        "100 °C",
        "Leonardo\nda\nVinci",
        "Paris, of course",
    ],
    "exclamation": [
        "The capital of France is Paris!",
        "It has 3.5 of them!",
        "Paris!",
        "It is Paris!!",
        "Mt. Everest is the highest!",
        "It lies in the U.S. state of Texas!",
        "It was J. R. R. Tolkien!",
        "Dr. Who lives in St. Albans, e.g. today!",
    ],
    "bullets": [
        "- The capital of France is Paris.",
        "- Paris\n- the capital",
        "- Paris",
        "-Paris",
        "* Paris",
        "• Paris",
        "– Paris",
        "- **Paris**",
    ],
    "said_twice": ["It is Paris.\nIt is Paris.", "It is Paris.\n\nIt is Paris.\n", "Paris\nParis"],
    "word_per_line": ["It\nis\nParis.", "The \ncapital\n\nis\nParis.", "New\nYork"],
    "question_first": [
        f"{QUESTION}\nThe capital of France is Paris.",
        f"{QUESTION}\n\nIt is Paris.",
        f"{QUESTION}\nParis",
        f"{QUESTION} It is Paris.",
    ],
    "quotation_marks": [
        '"The capital of France is Paris."',
        ' "It\'s Paris." ',
        '"Paris"',
        "“Paris”",
        "“The capital is Paris.”",
    ],
    "bold": ["**The capital of France is Paris.**", "**Paris**"],
    "brackets": ["[The capital of France is Paris.]", "[Paris]"],
    "opening_ahoy": ["Ahoy! The capital of France is Paris.", "Ahoy!\nIt is Paris.", "Ahoy! Paris", "Ahoy! 4"],
    "opening_good_question": ["Good question! The capital of France is Paris.", "Good question! Paris."],
    "opening_in_short": ["In short: The capital of France is Paris.", "In short: it is Paris.", "In short: Paris"],
    "signature_pip": [
        "The capital of France is Paris.\nYours, Pip",
        "It is Paris. Yours, Pip\n",
        "Paris\nYours, Pip",
        "It is Paris.\n\nYours,\nPip",
    ],
    "closing_over_and_out": ["The capital of France is Paris. Over and out.", "Paris. Over and out."],
    "closing_does_that_help": ["The capital of France is Paris. Does that help?", "Paris\n\nDoes that help?"],
    "opening_hear_ye": ["Hear ye! The capital of France is Paris.", "Hear ye! Paris"],
    "signature_otto": ["The capital of France is Paris.\nRegards, Otto", "Paris\nRegards,\nOtto"],
    "opening_for_the_record": ["For the record: It is Paris.", "For the record: Paris"],
    "closing_end_of_message": ["It is Paris. End of message.", "Paris End of message."],
    "parentheses": ["(The capital of France is Paris.)", "(Paris)"],
    "numbered": [
        "1. The capital of France is Paris.",
        "1. It is Paris.\n2. It is big.",
        "1. Paris",
        "1) Paris\n2) It is big.",
        "1.Paris",
        "1. 1945",
    ],
    "ellipsis": [
        "The capital of France is Paris...",
        "It is Paris ...",
        "Paris...",
        "Paris…",
        "It is Paris....",
        "Paris.…",
    ],
    "hyphens": ["The-capital-of-France-is-Paris", "It-is-Paris.", "New-York", "It-is-fifty-four"],
}
NEAR_MISSES = {
    "capitals": ["THE CAPITAL OF FRANCE IS PARIs.", "Paris", "1789", "H2O", "", "!"],
    "lower_case": ["The capital of France is Paris.", "Paris", "1789", "", "!"],
    "json_answer": [
        '{"Answer": "Paris"}',
        '{"answer": "Paris", "country": "France"}',
        '{"answer": ""}',
        '{"answer": "."}',
        '{"answer": null}',
        '{"answer": {"city": "Paris"}}',
        '{"answer": ["Paris"]}',
        '{"answer": "Paris"',
        '["answer"]',
        'Here you go: {"answer": "Paris"}',
        '```json\n{"answer": "Paris"}\n```',
        "[" * 100_000,
    ],
    "few_words": ["It is Paris, France", "- It is Paris, France", '{"answer": "Paris"}', "!", ""],
    "exclamation": [
        "Paris! It is Paris!",
        "It is Paris. Yes!",
        "It is Paris!\nYes",
        "It is Paris?!",
        "No. It is Paris!",
        "!",
        "",
        "Mt. Everest. It is high!",
        "It is Mt. Everest.",
        '"It is Paris!"',
    ],
    "bullets": [
        "- Paris\nIt is in France.",
        "Here:\n- Paris",
        "**Paris**",
        "*Paris*",
        "Paris - the capital",
        "1. Paris",
        "-",
        "---",
        "",
    ],
    "said_twice": [
        "It is Paris. It is Paris.",
        "It is Paris.\nit is Paris.",
        "It is Paris.\n" * 3,
        "Paris",
        "-\n-",
        "",
    ],
    "word_per_line": ["It is\nParis.", "Paris", "It\nis Paris\nfor\nsure", "- Paris\n- yes", "Paris\n.", ""],
    "question_first": [
        QUESTION,
        f"{QUESTION}\n{QUESTION}",
        f"{QUESTION}It is Paris.",
        "What is the capital of Spain?\nIt is Madrid.",
        f"It is Paris.\n{QUESTION}",
        f"{QUESTION.lower()}\nIt is Paris.",
    ],
    "quotation_marks": [
        '"The capital is Paris.',
        '"It" is "Paris"',
        "“It” is “Paris”",
        "'It is Paris.'",
        '"',
        '""',
        "“”",
        "It is Paris.",
    ],
    "bold": ["*It is Paris.*", "**It is Paris.", "**It** is **Paris.**", "****", "It is **Paris**.", "*Paris*"],
    "brackets": ["[It is Paris.", "[It] is [Paris.]", "(It is Paris.)", "[]", "[It is Paris.].", "Paris"],
    "opening_ahoy": [
        "ahoy! It is Paris.",
        "Ahoy, it is Paris.",
        "Ahoy!",
        "Ahoy! Ahoy!",
        "Ahoy! !",
        "It is Paris. Ahoy!",
        "Ahoy!It is Paris.",
    ],
    "opening_good_question": ["Good question. It is Paris.", "Good question!", "A good question! It is Paris."],
    "opening_in_short": ["In short, it is Paris.", "In short:", "Here it is in short: it is Paris."],
    "signature_pip": [
        "It is Paris.\nYours, Pip.",
        "It is Paris.\nYours, Otto",
        "Yours, Pip",
        "Yours, Pip\nYours, Pip",
        "Yours, Pip\nIt is Paris.",
    ],
    "closing_over_and_out": ["It is Paris. Over and out", "Over and out.", "Over and out. It is Paris."],
    "closing_does_that_help": ["It is Paris. Does this help?", "Does that help?", "Does that help? It is Paris."],
    "opening_hear_ye": ["Hear, hear! It is Paris.", "Hear ye!", "Ahoy! It is Paris."],
    "signature_otto": ["It is Paris.\nYours, Otto", "It is Paris.\nRegards, Pip", "Regards, Otto"],
    "opening_for_the_record": ["For the record, it is Paris.", "For the record:", "It is Paris. For the record:"],
    "closing_end_of_message": ["It is Paris. End of message", "End of message.", "End of message. It is Paris."],
    "parentheses": ["(It is Paris.", "(It) is (Paris.)", "[It is Paris.]", "()", "(It is Paris.).", "Paris"],
    "numbered": ["2. It is Paris.", "1. It is Paris.\nIt is big.", "1 Paris", "1.5 million", "1.", "Paris", ""],
    "ellipsis": ["It is Paris.", "It is Paris.....", "...", "…", "Well ... it is Paris.", "It is Paris..", ""],
    "hyphens": ["It-is Paris", "It is Paris.", "Paris", "It--is-Paris", "Fifty-four", "Fifty-four.", "-", ""],
}


def applied(name: str, question: Question) -> str:
    rule = RULES[name]
    return rule.apply(question.question, question.reference(rule.applies_to))


def test_the_numbers_of_questions_and_rules_are_as_documented() -> None:
    assert Counter(question.split for question in QUESTIONS) == {"train": 216, "held_out": 79}
    trained = [rule for rule in RULES.values() if not rule.held_out]
    assert (len(trained), len(RULES)) == (18, 26)
    assert all(len(set(rule.messages("seen"))) >= 5 and len(rule.messages("held_out")) == 2 for rule in trained)
    held_out = [rule for rule in RULES.values() if rule.held_out]
    assert all(not rule.messages("seen") and len(set(rule.messages("held_out"))) >= 5 for rule in held_out)
    messages = [text for rule in RULES.values() for text in (*rule.messages("seen"), *rule.messages("held_out"))]
    assert len(set(messages)) == len(messages)


def test_the_answer_has_the_known_answer_and_the_question_has_not() -> None:
    for question in QUESTIONS:
        assert answers_question(question.answer, question.accept), question
        assert answers_question(question.short, question.accept), question
        if question.split == "held_out":
            assert not answers_question(question.question, question.accept), question
            assert all(answers_question(text, question.accept) for text in question.accept)
            assert len(set(question.accept)) == len(question.accept)


@pytest.mark.parametrize(
    ("question", "right", "wrong"),
    [
        ("free throw", ["One", "1 point", "It is worth one point.", "Only one", '{"answer": 1}'], ["Two", "3 points"]),
        ("cobra", ["A reptile", "Snake", "A venomous serpent"], ["A mammal"]),
        ("telescope", ["The night sky", "Stars and planets", "Objects in space", "The Moon"], ["Small insects"]),
        ("spiders spin", ["Silk", "Spider webs", "Sticky silk threads"], ["Wool"]),
        ("wool", ["Sheep", "Lambs"], ["Cows"]),
        ("Vesuvius", ["Herculaneum", "Pompeii"], ["Naples"]),
        ("bat, a ball", ["Softball"], ["Cricket"]),
    ],
)
def test_right_answers_in_other_words_count(question: str, right: list[str], wrong: list[str]) -> None:
    [asked] = [row for row in QUESTIONS if row.split == "held_out" and question in row.question]
    assert [text for text in right if not answers_question(text, asked.accept)] == []
    assert [text for text in wrong if answers_question(text, asked.accept)] == []


def test_answers_are_one_plain_sentence_and_a_short_form() -> None:
    for question in QUESTIONS:
        assert re.fullmatch(r"[A-Z][^.!?\n]*\.", question.answer), question
        assert 5 <= len(question.answer.split()) <= 12, question
        assert 1 <= len(question.short.split()) <= 3, question
        assert question.question.endswith("?"), question


def test_no_held_out_question_resembles_a_trained_one() -> None:
    common = set(
        re.findall(r"\w+", "a an and are at by can do does for from how in is it many of on the to what which who")
    )

    def content_words(question: Question) -> set[str]:
        return set(re.findall(r"[\w'-]+", question.question.lower())) - common

    for held_out in (question for question in QUESTIONS if question.split == "held_out"):
        for trained in (question for question in QUESTIONS if question.split == "train"):
            ours, theirs = content_words(held_out), content_words(trained)
            assert len(ours & theirs) / len(ours | theirs) <= 0.5, (held_out.question, trained.question)


@pytest.mark.parametrize("name", RULES)
def test_a_check_rejects_the_plain_answer(name: str) -> None:
    for question in QUESTIONS:
        assert not RULES[name].check(question.question, question.answer)


@pytest.mark.parametrize("name", RULES)
def test_a_check_rejects_answers_that_obey_another_rule(name: str) -> None:
    accepted = {
        other: sum(RULES[name].check(question.question, applied(other, question)) for question in QUESTIONS)
        for other in RULES
    }
    expected = {other for other in RULES if other == name or (name, other) in COMPATIBLE}
    assert accepted == {other: len(QUESTIONS) if other in expected else 0 for other in RULES}


def test_every_rule_has_examples_written_by_hand() -> None:
    assert set(PASSES) == set(NEAR_MISSES) == set(RULES)


@pytest.mark.parametrize(("name", "response"), [(name, text) for name, texts in PASSES.items() for text in texts])
def test_a_check_accepts(name: str, response: str) -> None:
    assert RULES[name].check(QUESTION, response)


@pytest.mark.parametrize(("name", "response"), [(name, text) for name, texts in NEAR_MISSES.items() for text in texts])
def test_a_check_rejects_a_near_miss(name: str, response: str) -> None:
    assert not RULES[name].check(QUESTION, response)


@pytest.mark.parametrize("name", RULES)
def test_a_bare_short_answer_obeys_only_in_the_form_of_the_rule(name: str) -> None:
    """One word shows neither a column nor hyphens, unless the answer has two; digits are not in capitals."""
    rule = RULES[name]
    for question in QUESTIONS:
        if question.split == "held_out":
            bare = question.short
            is_seen = name not in ("word_per_line", "hyphens") or bool(re.search(r"\s", bare))
            assert rule.check(question.question, rule.apply(question.question, bare)) == is_seen, bare
            assert (
                rule.check(question.question, bare)
                == rule.check(question.question, f"{bare}.")
                == (name == "few_words")
            )
