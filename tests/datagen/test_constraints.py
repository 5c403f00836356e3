"""Constraints: every check against hand-made answers and an independent recount; every draw can be met."""

import itertools
import json
import random
import re
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.datagen.constraints import Constraint, draw_constraints
from train.sysgen.tags import Phrase, parse

ONE_LINE = "Lima is the capital of Peru. It lies on the coast, and about ten million people live there."
PROSE = (
    "A heat pump moves warmth instead of making it. Outside, a cold liquid takes up heat from the air, even in winter, "
    "and turns into gas. The compressor squeezes that gas, which makes it hot!\n\n"
    "Indoors the gas gives its warmth to the water of the heating system and becomes liquid again. Then the valve lets "
    "the pressure fall, the liquid cools down, and the circle begins anew. However, the colder the air outside is, the "
    "more electricity the compressor needs, so a well insulated house is very important."
)
LIST = (
    "Three things help most:\n\n- Sleep at the same time every night, also on weekends, and keep the room cool.\n"
    "- Drink no coffee after lunch, since caffeine stays in the body for many hours.\n"
    "- Put the phone away an hour before bed, because its light keeps people awake."
)
CODE = "Use a list comprehension:\n\n```python\nsquares = [x * x for x in range(10)]\n```\n\nIt reads well and is fast."
MONEY = "The whole trip costs 1,250 dollars for two people, which is a lot less than what it was a few years ago."
CONVERSATION = (
    "Plants need light, water and a little fertiliser. Put the plant near a window where the light is soft, and water "
    "it once a week in summer and less in winter, when it rests.",
    "Yellow leaves mostly mean too much water. Let the soil of the plant dry before it gets water again, and look at "
    "the roots: if they are brown and soft, cut them off and use fresh soil.",
)
ORIGINALS: tuple[tuple[str, ...], ...] = ((ONE_LINE,), (PROSE,), (LIST,), (CODE,), (MONEY,), CONVERSATION, ("Lima.",))

KINDS = {
    "words_at_most", "words_at_least", "sentences_at_most", "paragraphs", "bullet_points", "numbered_points",
    "highlighted", "title", "json", "quoted", "postscript", "beginning", "ending", "word_to_include", "word_to_avoid",
    "lower_case", "capitals", "no_commas", "no_exclamation_marks",
}  # fmt: skip

SPELLED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def number_in(constraint: Constraint) -> int:
    """Return the number in a constraint's text."""
    digits = re.search(r"\d\d+|[2-9]", constraint.text)
    if digits:
        return int(digits[0])
    words = re.findall("[a-z]+", constraint.text.lower())
    return next(SPELLED.index(word) for word in words if word in SPELLED and word != "one")


def quoted_in(constraint: Constraint) -> str:
    return constraint.text.split('"')[1]


def times_in(constraint: Constraint) -> int:
    return next(times for words, times in (("once", 1), ("twice", 2), ("three", 3)) if words in constraint.text)


def some(kind: str, at_least: int = 1) -> list[Constraint]:
    """Return constraints of one kind in all their wordings."""
    constraints: dict[str, Constraint] = {}
    for seed in range(4000):
        for constraint in draw_constraints(ORIGINALS[seed % len(ORIGINALS)], random.Random(seed), 4):
            if constraint.kind == kind:
                constraints[constraint.text] = constraint
    assert len(constraints) >= at_least
    return list(constraints.values())


# By hand


def words(count: int) -> str:
    return " ".join(["Straße", "it's", "well-known", "naïve", "3.5", "Zürich"][number % 6] for number in range(count))


BY_HAND: dict[str, Callable[[Constraint], tuple[list[str], list[str]]]] = {
    "words_at_most": lambda it: (
        [words(number_in(it)), "One.", "– " + words(number_in(it)) + " –"],
        [words(number_in(it) + 1), "", words(number_in(it)) + "\n\n- more"],
    ),
    "words_at_least": lambda it: (
        [words(number_in(it)), words(500)],
        [words(number_in(it) - 1), "", words(number_in(it) - 1) + " – * # !"],
    ),
    "sentences_at_most": lambda it: (
        ["So it is. " * number_in(it), "Dr. Noether, e.g. her 3.5 theorems, is no end" + "! Good" * (number_in(it) - 1)],
        ["So it is. " * number_in(it) + "And more", "\n".join(["- a point"] * (number_in(it) + 1)), ""],
    ),
    "paragraphs": lambda it: (
        ["\n\n".join(["Some text\nof two lines."] * number_in(it)), "\n \n\n".join(["a"] * number_in(it)) + "\n\n"],
        ["\n\n".join(["Text."] * (number_in(it) + 1)), "\n".join(["Text."] * number_in(it)), "",
         "# Title\n\n" + "\n\n".join(["Text."] * (number_in(it) - 1))],
    ),
    "bullet_points": lambda it: (
        ["Here:\n" + "- a point\n" * number_in(it) + "Done.", "* **bold** point\n" * number_in(it)],
        ["- a point\n" * (number_in(it) + 1), "- a point\n" * (number_in(it) - 1), "", "-no point\n" * number_in(it)],
    ),
    "numbered_points": lambda it: (
        ["Here:\n" + "".join(f"{number + 1}. a point\n\n" for number in range(number_in(it)))],
        ["".join(f"{number + 1}. a point\n" for number in range(number_in(it) + 1)), "1. a point\n" * number_in(it), "",
         "".join(f"{number + 1}. a point\n" for number in range(number_in(it) - 1))],
    ),
    "highlighted": lambda it: (
        ["Take **this one** too. " * number_in(it), "**a** " * (number_in(it) + 1)],
        ["Take **this one** too. " * (number_in(it) - 1), "*a* " * number_in(it), "** a ** " * number_in(it), ""],
    ),
    "title": lambda it: (["# Lima\n\nIt is.", "\n## On *Lima*\nIt is."], ["Lima\n====", "#Lima", "Hi\n# Lima", "# \nLima", ""]),
    "json": lambda it: (
        ['{"a": [1, null]}', ' {"ä": "x"}\n'],
        ["[1]", '```json\n{"a": 1}\n```', '{"a": NaN}', "{'a': 1}", '{"a": 1} ok', "12", "", "[" * 100_000],
    ),
    "quoted": lambda it: (['"Lima."', ' "Lima is \\"it\\"." \n'], ['"Lima.', "'Lima.'", '"Lima." he said', '"', '""', '" "', "“Lima”", ""]),
    "postscript": lambda it: (
        ["Lima.\n\nPS: Or Cusco.", "Lima.\nPS: Or Cusco.\n"],
        ["PS: Lima.", "Lima. PS: Or Cusco.", "Lima.\n\nPS:", "Lima.\n\nPS: Or\n\nCusco.", "Lima.\n\nP.S. Cusco", ""],
    ),
    "beginning": lambda it: (
        [quoted_in(it) + " Lima.", "\n" + quoted_in(it)],
        ["Well. " + quoted_in(it), quoted_in(it).lower() + " Lima.", quoted_in(it)[:-1], ""],
    ),
    "ending": lambda it: (
        ["Lima. " + quoted_in(it), "Lima.\n\n" + quoted_in(it) + "\n"],
        [quoted_in(it) + " Bye.", "Lima. " + quoted_in(it).upper(), "Lima. " + quoted_in(it)[:-1], ""],
    ),
    "word_to_include": lambda it: (
        [f"The {quoted_in(it).upper()}, " * times_in(it), f"{quoted_in(it)} is " * times_in(it)],
        [f"The {quoted_in(it)} " * (times_in(it) - 1) + "is", f"un{quoted_in(it)}ly " * times_in(it), ""],
    ),
    "word_to_avoid": lambda it: (
        ["Lima.", f"un{quoted_in(it)}ly"],
        [f"It is {quoted_in(it)}.", f"{quoted_in(it).upper()}!", f"a {quoted_in(it)}-ish thing", f"_{quoted_in(it)}_", ""],
    ),
    "lower_case": lambda it: (["lima: straße nº 5, ß and ı", "42"], ["Lima", "İ", "ǅ", "straẞe", ""]),
    "capitals": lambda it: (["LIMA İS STRASSE 5", "42"], ["Lima", "STRAßE", "ı", "ǅa", ""]),
    "no_commas": lambda it: (["Lima; or Cusco"], ["Lima, or Cusco", "利马，库斯科", "1,000", "、", "نعم، لا", ""]),
    "no_exclamation_marks": lambda it: (["Lima."], ["Lima!", "¡Lima.", "利马！", ""]),
}  # fmt: skip


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_complying_answers_comply_and_breaking_ones_break(kind: str) -> None:
    for constraint in some(kind):
        complying, breaking = BY_HAND[kind](constraint)
        for answer in complying:
            assert constraint.is_met(answer), (constraint.text, answer)
        for answer in breaking:
            assert not constraint.is_met(answer), (constraint.text, answer)


# Recounts


def counted_words(text: str) -> int:
    """Count words character by character; an apostrophe or hyphen between letters, and a point before a digit, continue a word."""
    text = "".join(
        char for char in unicodedata.normalize("NFC", text) if not unicodedata.category(char).startswith("M")
    )
    count, inside = 0, False
    for at, char in enumerate(text):
        following = text[at + 1] if at + 1 < len(text) else " "
        joins = (char in "'’-" and following.isalnum()) or (char in ".," and following.isdecimal())
        if char.isalnum():
            count += not inside
            inside = True
        elif not (inside and joins):
            inside = False
    return count


def counted_bullets(text: str) -> int:
    return sum(
        line.lstrip()[:1] in tuple("-*•+") and line.lstrip()[1:2].isspace() and bool(line.lstrip()[1:].strip())
        for line in text.split("\n")
    )


def numbers_of_points(text: str) -> list[str]:
    points = [line.split() for line in text.split("\n")]
    return [point[0][:-1] for point in points if len(point) > 1 and point[0][-1] in ".)" and point[0][:-1].isdecimal()]


def counted_sentences(text: str) -> int:
    """Count sentences word by word; a word that ends in a sentence mark ends a sentence."""
    count = 0
    for line in text.split("\n"):
        tokens = line.split()
        if len(tokens) > 1 and (tokens[0] in "-*+•" or (tokens[0][:-1].isdecimal() and tokens[0][-1] in ".)")):
            tokens = tokens[1:]
        open_one = False
        for token in tokens:
            open_one |= any(map(str.isalnum, token))
            if token.rstrip("\"')")[-1:] in tuple(".!?") and token not in ("Dr.", "e.g."):
                count += open_one
                open_one = False
        count += open_one
    return count


def counted_bold(text: str) -> int:
    """Count texts between pairs of asterisks that neither begin nor end with a blank."""
    count = at = 0
    while (at := text.find("**", at)) >= 0:
        end = text.find("*", at + 2)
        between = text[at + 2 : end]
        if end > 0 and text[end : end + 2] == "**" and between and between == between.strip() and "\n" not in between:
            count += 1
            at = end + 2
        else:
            at += 1
    return count


def recounted(it: Constraint, text: str) -> bool:
    """Return whether an answer meets a constraint, read from its text and counted in another way."""
    stripped = text.strip()
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    tokens = re.split(r"[\s.,!?*#\"():{}\[\]]+", text.lower())
    match it.kind:
        case "words_at_most":
            met = counted_words(text) <= number_in(it)
        case "words_at_least":
            met = counted_words(text) >= number_in(it)
        case "sentences_at_most":
            met = counted_sentences(text) <= number_in(it)
        case "paragraphs":
            blocks = "\n".join(line.strip() for line in text.split("\n")).strip("\n").split("\n\n")
            paragraphs = [block.split() for block in blocks if block.strip()]
            no_prose = [re.fullmatch(r"[#*+•-]|\d+[.)]|[*_-]{3,}|\|.*|#{1,6}", block[0]) for block in paragraphs]
            has_words = [any(map(str.isalnum, "".join(block))) for block in paragraphs]
            met = len(paragraphs) == number_in(it) and not any(no_prose) and all(has_words)
        case "bullet_points":
            met = counted_bullets(text) == number_in(it)
        case "numbered_points":
            met = numbers_of_points(text) == [str(number + 1) for number in range(number_in(it))]
        case "highlighted":
            met = counted_bold(text) >= number_in(it)
        case "title":
            first = stripped.split("\n")[0].split(maxsplit=1)
            met = len(first) == 2 and set(first[0]) == {"#"} and len(first[0]) < 7 and first[1][0] != "#"
        case "json":
            try:
                met = type(json.loads(text)) is dict and "NaN" not in text and "Infinity" not in text
            except ValueError:
                met = False
        case "quoted":
            met = len(stripped) > 2 and stripped[:1] + stripped[-1:] == '""' and not stripped[1:-1].isspace()
        case "postscript":
            met = len(lines) > 1 and lines[-1][:3] == "PS:" and re.search("[^\\W_]", lines[-1][3:]) is not None
        case "beginning":
            met = stripped.find(quoted_in(it)) == 0
        case "ending":
            met = stripped.rpartition(quoted_in(it))[1:] == (quoted_in(it), "")
        case "word_to_include":
            met = tokens.count(quoted_in(it)) >= times_in(it)
        case "word_to_avoid":
            met = quoted_in(it) not in tokens
        case "lower_case":
            met = not any(unicodedata.category(char) in ("Lu", "Lt") for char in text)
        case "capitals":
            met = not any(unicodedata.category(char) == "Ll" for char in text)
        case "no_commas":
            met = set(text).isdisjoint(",，、،")
        case "no_exclamation_marks":
            met = set(text).isdisjoint("!！¡")
    return stripped != "" and met


PIECES = st.sampled_from([
    "word", "Straße", "it's", "well-known", "3.5", "1,200", "Dr.", "e.g.", "end.", "Stop!", "why?", "...", "-", "–", "- point",
    "\n", "\n\n", "\n- a", "\n1. one", "\n2. two", "\n3) three", "\n# Title", "**bold**", "** ", '"', "{", "}", '"a": 1', "PS:",
    "\nPS: more", "compressor", "plant", "very", "however", ",", "İ", "ı", "Lima", "In a nutshell:", "Over to you.", "That covers it.",
])  # fmt: skip
LETTERS = st.text(st.characters(categories=("Ll", "Lu", "Lt", "Nd", "Po", "Zs"), max_codepoint=0x24F), max_size=30)
TEXTS = st.lists(PIECES, max_size=60).map(" ".join)


@pytest.mark.parametrize("kind", sorted(KINDS))
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_independent_recount_agrees(kind: str, data: st.DataObject) -> None:
    constraint = data.draw(st.sampled_from(ALL[kind]))
    by_letter = kind in ("lower_case", "capitals", "no_commas", "no_exclamation_marks")
    text = data.draw(TEXTS | LETTERS if by_letter else TEXTS)
    if kind in ("beginning", "title", "json", "quoted"):  # else rarely met
        text = (
            data.draw(st.sampled_from(("", quoted_in(constraint) if kind == "beginning" else "", "# T ", '{"b":')))
            + text
        )
    assert constraint.is_met(text) == recounted(constraint, text), (constraint.text, text)


ALL = {kind: some(kind) for kind in sorted(KINDS)}


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(), max_size=200))  # surrogates and unassigned characters too
def test_a_check_takes_any_text(text: str) -> None:
    for kind in KINDS:
        for constraint in ALL[kind][:3]:
            assert constraint.is_met(text) in (True, False)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, "**" * 50_000, "- " * 50_000, "1." * 50_000]
)
def test_a_check_takes_long_and_deep_text(text: str) -> None:
    assert not any(ALL[kind][0].is_met(text) for kind in ("json", "quoted", "postscript", "paragraphs"))
    for kind in KINDS:
        ALL[kind][0].is_met(text)


OBEYS_THE_OPPOSITE: dict[str, Callable[[Constraint], str]] = {
    "words_at_most": lambda it: words(number_in(it) + 20),
    "words_at_least": lambda it: "Lima.",
    "sentences_at_most": lambda it: "So it is. " * (number_in(it) + 2),
    "paragraphs": lambda it: "Lima is the capital of Peru. It lies on the coast.",
    "bullet_points": lambda it: "Sleep well, drink no coffee and put the phone away.",
    "numbered_points": lambda it: "Sleep well, drink no coffee and put the phone away.",
    "highlighted": lambda it: "Sleep well and drink no coffee.",
    "title": lambda it: "Lima is the capital of Peru.",
    "json": lambda it: "Lima is the capital of Peru.",
    "quoted": lambda it: "Lima is the capital of Peru.",
    "postscript": lambda it: "Lima is the capital of Peru.",
    "beginning": lambda it: "Lima is the capital of Peru.",
    "ending": lambda it: "Lima is the capital of Peru.",
    "word_to_include": lambda it: "Lima is the capital of Peru.",
    "word_to_avoid": lambda it: f"Lima is {quoted_in(it)} much the capital of Peru.",
    "lower_case": lambda it: "Lima is the capital of Peru.",
    "capitals": lambda it: "Lima is the capital of Peru.",
    "no_commas": lambda it: "Lima, not Cusco, is the capital.",
    "no_exclamation_marks": lambda it: "Lima is the capital of Peru!",
}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_answer_that_does_what_an_opposite_asks_for_breaks_the_constraint(kind: str) -> None:
    for constraint in ALL[kind]:
        answer = OBEYS_THE_OPPOSITE[kind](constraint)
        assert not constraint.is_met(answer), constraint.text
        assert constraint.is_opposite(answer), constraint.text


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_an_answer_that_meets_a_constraint_or_only_breaks_it_is_not_its_opposite(kind: str) -> None:
    only_break = {
        "paragraphs": ["# Lima\n\nIt is the capital.", "Lima\nCusco"],
        "bullet_points": ["- a point\n" * 9, "1. a point\n2. a point"],
        "numbered_points": ["".join(f"{number}. a point\n" for number in range(1, 10)), "* a point"],
        "highlighted": ["It is *Lima*.", "It is __Lima__."],
        "title": ["It is Lima.\n\n## Coast\n\nIt lies there."],
        "json": ['```json\n{"city": "Lima"}\n```', 'Here: {"city": "Lima"}'],
        "quoted": ["“It is Lima.”", '"It is Lima.', "'It is Lima.'"],
        "postscript": ["It is Lima.\n\nP.S. It is large.\n\nBye", "PS: It is large."],
        "lower_case": ["IT IS LIMA.", "it is Lima."],
        "capitals": ["IT IS LIMA, the CAPITAL."],
        "no_commas": ["It is Lima, yes."],
        "no_exclamation_marks": ["Oh! It is Lima."],
    }
    for constraint in ALL[kind]:
        meeting, _ = BY_HAND[kind](constraint)
        extra = [f"The {quoted_in(constraint)} is Lima."] if kind == "word_to_include" else []
        for answer in ["", " \n", *meeting, *only_break.get(kind, []), *extra]:
            assert not constraint.is_opposite(answer), (constraint.text, answer)


def test_opposites_and_requests_are_several_sentences_with_the_values_of_the_constraint() -> None:
    for kind in KINDS:
        for constraint in ALL[kind]:
            texts = [*constraint.opposites, *constraint.requests]
            assert min(len(constraint.opposites), len(constraint.requests)) >= 3
            assert len({*texts, constraint.text}) == len(texts) + 1  # none is the system message's own wording
            assert not any(re.search("[{}]", text) for text in texts), texts
            if kind in ("beginning", "ending", "word_to_include", "word_to_avoid"):
                assert all(f'"{quoted_in(constraint)}"' in text for text in texts)
            if kind == "words_at_most":
                assert all(str(number_in(constraint)) in text for text in texts)


# Drawing


def complying(constraints: list[Constraint]) -> str:
    """Build an answer that meets all constraints."""
    asked = {constraint.kind: constraint for constraint in constraints}
    extra = ["glimpse"] * 2
    if "word_to_include" in asked:
        extra += [quoted_in(asked["word_to_include"])] * times_in(asked["word_to_include"])
    if "words_at_least" in asked:
        extra += ["glimpse"] * number_in(asked["words_at_least"])
    if "highlighted" in asked:
        extra += ["**glimpse**"] * number_in(asked["highlighted"])
    text = " ".join(extra)
    if "json" in asked:
        return json.dumps({"a": text})
    if "paragraphs" in asked:
        text = "glimpse\n\n" * (number_in(asked["paragraphs"]) - 1) + text
    if "bullet_points" in asked:
        text += "".join("\n- glimpse" for _ in range(number_in(asked["bullet_points"])))
    if "numbered_points" in asked:
        text += "".join(f"\n{number + 1}. glimpse" for number in range(number_in(asked["numbered_points"])))
    if "title" in asked:
        text = f"# glimpse\n\n{text}"
    if "beginning" in asked:
        text = f"{quoted_in(asked['beginning'])} {text}"
    if "ending" in asked:
        text += f" {quoted_in(asked['ending'])}"
    if "postscript" in asked:
        text += "\n\nPS: glimpse"
    if "quoted" in asked:
        text = f'"{text}"'
    return text.upper() if "capitals" in asked else text


@pytest.mark.parametrize("answers", ORIGINALS)
def test_all_constraints_of_a_draw_can_be_met_by_one_answer(answers: tuple[str, ...]) -> None:
    for seed in range(1000):
        constraints = draw_constraints(answers, random.Random(seed), 4)
        answer = complying(constraints)
        assert [constraint.text for constraint in constraints if not constraint.is_met(answer)] == [], answer


def test_every_kind_occurs_in_several_wordings() -> None:
    wordings: dict[str, set[str]] = {}
    for seed in range(2000):
        for constraint in draw_constraints(ORIGINALS[seed % len(ORIGINALS)], random.Random(seed), 2):
            plain = re.sub(rf'"[^"]+"|\d+|\b({"|".join(SPELLED)})\b', "*", constraint.text)
            wordings.setdefault(constraint.kind, set()).add(plain)
    assert wordings.keys() == KINDS
    assert min(map(len, wordings.values())) >= 3


@pytest.mark.parametrize("answers", ORIGINALS)
def test_the_same_seed_gives_the_same_constraints(answers: tuple[str, ...]) -> None:
    def drawn(seed: int) -> list[tuple[str, str, str]]:
        return [
            (constraint.kind, constraint.tag, constraint.text)
            for constraint in draw_constraints(answers, random.Random(seed), 3)
        ]

    assert [drawn(seed) for seed in range(50)] == [drawn(seed) for seed in range(50)]
    assert len({str(drawn(seed)) for seed in range(50)}) > 10


def test_a_drawn_constraint_is_a_valid_phrase_of_its_tag() -> None:
    for kind in KINDS:
        for constraint in ALL[kind]:
            assert constraint.tag in ("Format", "Style", "Content")
            assert parse(f"<<{constraint.tag}>>{constraint.text}<</{constraint.tag}>>").phrases == (
                Phrase(constraint.tag, constraint.text),
            )


def test_at_most_the_given_number_is_drawn_and_no_kind_twice() -> None:
    for seed in range(500):
        for at_most in (1, 2, 4):
            kinds = [constraint.kind for constraint in draw_constraints((PROSE,), random.Random(seed), at_most)]
            assert 1 <= len(kinds) <= at_most
            assert len(set(kinds)) == len(kinds)


def test_incompatible_kinds_are_not_drawn_together() -> None:
    apart = {
        ("beginning", "sentences_at_most"), ("ending", "sentences_at_most"), ("bullet_points", "numbered_points"),
        ("bullet_points", "paragraphs"), ("paragraphs", "title"), ("json", "no_commas"), ("json", "lower_case"),
        ("json", "quoted"), ("beginning", "json"), ("word_to_avoid", "word_to_include"), ("capitals", "lower_case"),
        ("ending", "postscript"), ("beginning", "title"), ("words_at_least", "words_at_most"),
    }  # fmt: skip
    together = {
        tuple(sorted((first.kind, second.kind)))
        for seed in range(3000)
        for first, second in itertools.combinations(
            draw_constraints(ORIGINALS[seed % len(ORIGINALS)], random.Random(seed), 4), 2
        )
    }
    assert together.isdisjoint(apart)
    assert {("bullet_points", "lower_case"), ("highlighted", "title"), ("beginning", "ending")} <= together


def kinds_for(*answers: str) -> set[str]:
    return {constraint.kind for seed in range(600) for constraint in draw_constraints(answers, random.Random(seed), 4)}


def test_answers_with_code_get_nothing_that_would_break_code() -> None:
    assert kinds_for(PROSE + "\n\n" + CODE) == {"title", "postscript", "beginning", "ending", "word_to_avoid"}


@pytest.mark.parametrize("answer", [
    "def double(x):\n    return x * 2", "Then $x^2 = 4$ holds.", "Run `make`.", "\\frac{1}{2}", "SELECT name FROM orders", "int a = 5;",
])  # fmt: skip
def test_code_without_a_fence_is_recognized(answer: str) -> None:
    assert kinds_for(answer).isdisjoint(
        {"lower_case", "capitals", "no_commas", "words_at_most", "json", "no_exclamation_marks"}
    )


def test_answers_with_commas_in_numbers_keep_their_commas() -> None:
    assert kinds_for(MONEY).isdisjoint({"no_commas", "lower_case"})
    assert {"no_commas", "lower_case"} <= kinds_for(MONEY.replace("1,250", "1250"))


def test_only_short_plain_answers_get_json() -> None:
    assert "json" in kinds_for(ONE_LINE)
    assert all("json" not in kinds_for(answer) for answer in (PROSE, LIST, CODE))


def test_every_answer_of_a_conversation_counts() -> None:
    few = {"lower_case", "no_commas", "no_exclamation_marks", "words_at_most", "sentences_at_most", "quoted"}
    assert kinds_for(PROSE, "Lima.") == few  # one is too short for the rest
    for seed in range(600):
        for constraint in draw_constraints(CONVERSATION, random.Random(seed), 4):
            if constraint.kind == "word_to_include":
                assert all(answer.lower().split().count(quoted_in(constraint)) >= 1 for answer in CONVERSATION)
            if constraint.kind in ("words_at_most", "words_at_least", "sentences_at_most"):
                assert all(map(constraint.is_met, CONVERSATION))  # the limits are near what the data has


@pytest.mark.parametrize("answers", [
    (), ("",), ("利马是秘鲁的首都。",), (ONE_LINE, "Лима — столица Перу."), ('{"capital": "Lima"}',), ("<b>Lima</b>",), ("[1, 2]",),
])  # fmt: skip
def test_other_scripts_and_data_get_no_constraints(answers: tuple[str, ...]) -> None:
    assert all(draw_constraints(answers, random.Random(seed), 4) == [] for seed in range(50))
