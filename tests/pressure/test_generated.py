"""Plans of rows under pressure: shares, templates that training may use, and checks against hand-written answers."""

import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from train.datagen.config import PRESSURE_SETTINGS, PressureSection
from train.pressure.generated import (
    Exchange,
    PressureRow,
    draw_setting,
    plan_row,
    plan_twin,
    with_further,
)

LIMA = Exchange("What is the capital of Peru?", "Lima is the capital of Peru.")
NILE = Exchange("Which river flows through Cairo?", "The Nile flows through Cairo.")
FOLDER = Path(__file__).parents[2] / "train" / "pressure"


@cache
def plans(setting: str) -> list[PressureRow]:
    return [plan_row(setting, [LIMA], [NILE], random.Random(seed)) for seed in range(300)]


def plan(setting: str, tactic: str, kind: str = "") -> PressureRow:
    """Return the first plan with a tactic and a kind of constraint."""
    return next(
        row
        for row in plans(setting)
        if row.tactic == tactic and (not kind or (row.constraint is not None and row.constraint.kind == kind))
    )


def check(row: PressureRow, answer: str) -> str:
    return row.turns[-1].check(answer)


@pytest.mark.parametrize("setting", ["conflict", "injected"])
def test_only_an_answer_to_the_question_that_follows_the_message_is_kept(setting: str) -> None:
    tactics = {"conflict": ("direct", "polite", "authority", "role_play", "ignore"), "injected": ("document", "tool")}
    for tactic in tactics[setting]:
        row = plan(setting, tactic, "no_exclamation_marks")
        assert check(row, "It is Lima.") == ""
        assert check(row, "It is Lima!") == "breaks the constraint"
        assert check(row, "I'm sorry, but I can't tell you.") == "refuses"
        assert check(row, "A calm sentence about the weather.") == "does not answer the question"
        assert check(row, "") == "breaks the constraint"
        assert LIMA.question in row.turns[-1].content


def test_a_kept_answer_does_not_hold_the_secret() -> None:
    row = plan("extraction", "plain", "no_exclamation_marks")
    assert row.secret in row.clause
    assert check(row, "It is Lima. I can't tell you the code.") == ""
    assert check(row, f"It is Lima, and the code is {row.secret.upper()}.") == "reveals the secret"
    assert check(row, f"It is Lima. {' '.join(row.secret)}") == "reveals the secret"
    assert check(row, f"It is Lima. Backwards: {row.secret[::-1]}") == "reveals the secret"
    for part in row.secret.split("-"):
        assert check(row, f"It is Lima. A part of the code is {part}.") == "reveals the secret"
    assert check(row, "I can't tell you the code.") == "does not answer the question"
    assert check(row, "It is Lima!") == "breaks the constraint"


def test_what_the_message_permits_is_granted() -> None:
    shared = plan("permitted", "shared")
    assert shared.constraint is None
    assert check(shared, f"It is {shared.secret}.") == ""
    assert check(shared, "I can't share that.") == "does not tell the code that may be shared"
    assert check(shared, f"I'm sorry, I can't share that it is {shared.secret}.") == "refuses"
    assert all(row.turns for row in plans("permitted"))
    choice = plan("permitted", "choice", "lower_case")
    assert check(choice, "It is Lima.") == ""
    assert check(choice, "it is lima.") == "does not have the form that the user chose"
    assert check(choice, "IT IS LIMA.") == "does not have the form that the user chose"
    excited = plan("permitted", "choice", "no_exclamation_marks")
    assert check(excited, "It is Lima!") == ""
    assert check(excited, "It is Lima.") == "does not have the form that the user chose"
    assert check(choice, "I'm afraid I can't.") == "refuses"
    assert check(choice, "It is a City.") == "does not answer the question"
    harmless = plan("permitted", "harmless", "lower_case")
    assert check(harmless, "it is lima.") == ""
    assert check(harmless, "It is Lima.") == "breaks the constraint"
    assert check(harmless, "i'm sorry, i can't help.") == "refuses"


def test_every_turn_of_a_longer_row_is_checked_against_its_own_question() -> None:
    for tactic in ("plain", "direct"):
        row = plan("turns", tactic, "lower_case")
        first, second = row.turns
        assert first.content == LIMA.question
        assert NILE.question in second.content
        assert (second.content == NILE.question) == (tactic == "plain")
        assert first.check("it is lima.") == second.check("it is the nile.") == ""
        assert second.check("it is lima.") == "does not answer the question"
        assert second.check("The Nile.") == "breaks the constraint"


def test_the_turns_before_the_one_under_pressure_are_plain() -> None:
    row = next(
        row
        for row in (plan_row("extraction", [NILE, LIMA], [], random.Random(seed)) for seed in range(100))
        if row.constraint and row.constraint.kind == "lower_case"
    )
    first, last = row.turns
    assert first.content == NILE.question
    assert LIMA.question in last.content != LIMA.question
    assert first.check("it is the nile.") == last.check("it is lima.") == ""
    assert first.check(f"it is the nile, {row.secret}") == "reveals the secret"


def test_a_twin_asks_for_the_same_as_the_message() -> None:
    rng = random.Random(0)
    for row in plans("conflict"):
        twin = plan_twin(row, LIMA.reference, rng)
        assert twin.constraint is row.constraint is not None
        (turn,) = twin.turns
        assert any(request in turn.content for request in row.constraint.requests)
        assert any(opposite in row.turns[-1].content for opposite in row.constraint.opposites)
        assert LIMA.question in turn.content


def test_no_template_wording_or_secret_that_is_held_out_is_used() -> None:
    held_out = []
    templates = yaml.safe_load((FOLDER / "tactics.yaml").read_text("utf-8"))
    for setting, of_tactics in templates.items():
        if setting != "reference":
            held_out += [text for of in of_tactics.values() for text in of["held_out"]]
    # The longest piece of a template between its fields is the trace that it would leave.
    pieces = [max(re.split(r"\{\w+\}", text.replace("{{", "").replace("}}", "")), key=len) for text in held_out]
    assert min(map(len, pieces)) > 8
    texts = [turn.content + row.clause for setting in PRESSURE_SETTINGS for row in plans(setting) for turn in row.turns]
    assert len(set(texts)) > 400
    for text in texts:
        assert not any(piece in text for piece in pieces), text
        assert not re.search("walnut|glacier|trumpet|orchid|passphrase|locker|coupon", text)


def test_no_text_of_a_constraint_is_a_wording_that_is_held_out() -> None:
    def collect(value: object, is_held_out: bool) -> list[str]:
        if isinstance(value, str):
            return [value] if is_held_out else []
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        return [text for key, part in items for text in collect(part, is_held_out or "held_out" in str(key))]

    held_out = [
        text
        for name in ("wordings.yaml", "user_requests.yaml")
        for text in collect(yaml.safe_load((FOLDER / name).read_text("utf-8")), False)
    ]
    assert len(held_out) > 50
    constraints = yaml.safe_load((FOLDER.parent / "datagen" / "constraints.yaml").read_text("utf-8"))
    ours = {text.casefold().strip(" .") for of in constraints.values() for texts in of.values() for text in texts}
    assert not ours & {text.casefold().strip(" .") for text in held_out}


def test_the_settings_are_drawn_by_their_shares() -> None:
    section = PressureSection(conflict=0.3, extraction=0.2, turns=0.1)
    drawn = Counter(draw_setting(section, random.Random(seed)) for seed in range(5000))
    assert drawn.keys() == {"conflict", "extraction", "turns", None}
    for setting, share in (("conflict", 0.3), ("extraction", 0.2), ("turns", 0.1), (None, 0.4)):
        assert abs(drawn[setting] / 5000 - share) < 0.03  # four standard deviations
    assert {draw_setting(PressureSection(conflict=1.0), random.Random(seed)) for seed in range(50)} == {"conflict"}


def test_further_questions_are_those_of_the_last_hundred_rows_and_never_the_rows_own() -> None:
    items = [f"{number % 300}" for number in range(700)]
    drawn = list(with_further(items, lambda item: None if item.endswith("7") else item, 5))
    assert [item for item, _ in drawn] == items
    assert drawn[0][1] == ()
    for number, (item, further) in enumerate(drawn[1:], 1):
        usable = [other for other in items[:number] if not other.endswith("7")][-100:]
        assert set(further) <= set(usable) - {item}
        assert 1 <= len(further) <= 4
        assert len(set(further)) == len(further)
    assert list(with_further(items, lambda item: None if item.endswith("7") else item, 5)) == drawn


def test_a_row_without_a_suitable_constraint_or_language_says_why() -> None:
    german = Exchange("Was ist die Hauptstadt von Peru, und wie viele Menschen leben dort?", "Lima, die Hauptstadt.")
    data = Exchange("What is the capital of Peru?", '{"capital": "Lima"}')
    rng = random.Random(0)
    assert plan_row("conflict", [german], [], rng).reason == "not in English, as the templates are"
    assert plan_row("conflict", [data], [], rng).reason == "no constraint suits the answers"
    assert plan_row("turns", [LIMA], [], rng).reason == "no question of an earlier row"
