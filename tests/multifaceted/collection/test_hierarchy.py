"""Hierarchy of preferences: files, their errors, and the balanced plan."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from train.errors import UserError
from train.multifaceted.collection.hierarchy import DIMENSIONS, OURS, PreferencePlan, SubDimension, load_hierarchy


def hierarchy_of(sizes: list[int], preferences: int = 4) -> dict[str, dict[str, SubDimension]]:
    """Return a hierarchy with these numbers of sub-dimensions."""
    return {
        dimension: {
            f"s{number}": SubDimension(
                dimension, f"s{number}", "m", {f"{number} p{index}": None for index in range(preferences)}
            )
            for number in range(size)
        }
        for dimension, size in zip(DIMENSIONS, sizes, strict=True)
    }


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=4, max_size=4),
    sets=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    order=st.randoms(use_true_random=False),
)
def test_counts_differ_by_one_at_most_and_siblings_differ(
    sizes: list[int], sets: int, seed: int, count: int, order: Any
) -> None:
    plan = PreferencePlan(hierarchy_of(sizes, 6), sets, seed)
    numbers = list(range(count))
    order.shuffle(numbers)  # in any order of calls
    planned_sets = {number: plan.sets_of(number) for number in numbers}
    second_plan = PreferencePlan(hierarchy_of(sizes, 6), sets, seed)
    assert planned_sets == {number: second_plan.sets_of(number) for number in range(count)}
    for place, size in enumerate(sizes):
        counts = Counter({f"s{number}": 0 for number in range(size)})
        preferences: dict[str, Counter[str]] = {name: Counter() for name in counts}
        for number in range(count):
            planned = [preference_set[place] for preference_set in planned_sets[number]]
            names = Counter(part.sub.name for part in planned)
            assert len({part.preference for part in planned}) == sets  # all siblings differ
            assert max(names.values()) - min(names[name] for name in counts) <= 1  # shared as rarely as possible
            for part in planned:
                counts[part.sub.name] += 1
                preferences[part.sub.name][part.preference] += 1
                assert part.preference in part.sub.preferences
                assert set(part.examples) <= set(part.sub.preferences)
                # After each set, not only at the end.
                assert max(counts.values()) - min(counts.values()) <= 1
        for name, times in preferences.items():
            assert max(times.values(), default=0) - min(times[f"{name[1:]} p{index}"] for index in range(6)) <= 1


def test_sub_dimensions_of_two_dimensions_are_independent() -> None:
    """Every combination of the sub-dimensions of two dimensions occurs, about equally often."""
    plan = PreferencePlan(load_hierarchy(), 3, 42)
    together = Counter(
        (preference_set[0].sub.name, preference_set[3].sub.name)
        for number in range(500)
        for preference_set in plan.sets_of(number)
    )
    assert len(together) == 25
    assert min(together.values()) > 0.6 * 60
    assert max(together.values()) < 1.6 * 60
    other_plan = PreferencePlan(load_hierarchy(), 3, 43)
    assert [preference_set[0].sub.name for preference_set in plan.sets_of(0)] != [
        preference_set[0].sub.name for preference_set in other_plan.sets_of(0)
    ]


def test_our_hierarchy_has_the_sub_dimensions_of_the_published_data_set() -> None:
    ours = load_hierarchy()
    assert {dimension: set(subs) for dimension, subs in ours.items()} == {
        "style": {"conciseness", "vividness", "clarity", "format", "tone"},
        "background_knowledge": {"novice", "basic", "intermediate", "advanced", "expert"},
        "informativeness": {"depth", "creativity", "efficiency", "practicality", "relevance"},
        "harmlessness": {"accuracy", "morality", "safety", "sensitivity", "trustworthiness"},
    }
    plain = yaml.safe_load(OURS.read_text("utf-8"))
    for dimension, subs in ours.items():
        for name, sub in subs.items():
            assert dict(sub.preferences) == plain[dimension][name]["preferences"]
            assert len(sub.preferences) >= 4
            assert sum(text is not None for text in sub.preferences.values()) >= 2


def test_a_file_extends_or_replaces_ours(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "style:\n"
        "  tone:\n"
        "    preferences:\n"
        "      Dry  wit!: Now it has a description.\n"
        "      Like a sea shanty:\n"
        "  layout:\n"
        "    meaning: where things stand\n"
        "    preferences: [Centred, All in columns]\n"
    )
    both, ours = load_hierarchy(path), load_hierarchy()
    tone = both["style"]["tone"]
    assert tone.meaning == ours["style"]["tone"].meaning
    assert tone.preferences == {
        **ours["style"]["tone"].preferences,
        "Dry wit": "Now it has a description.",
        "Like a sea shanty": None,
    }
    assert both["style"]["layout"] == SubDimension(
        "style", "layout", "where things stand", {"Centred": None, "All in columns": None}
    )
    assert both["harmlessness"] == ours["harmlessness"]
    with pytest.raises(UserError, match="no sub-dimension of background_knowledge, informativeness, harmlessness"):
        load_hierarchy(_alone(tmp_path), ours=False)


def _alone(folder: Path) -> Path:
    path = folder / "alone.yaml"
    path.write_text("style:\n  layout:\n    meaning: m\n    preferences: [Centred]\n")
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("styel:\n  a: {meaning: m, preferences: [x]}", "1: styel: unknown dimension. Allowed: style, background_knowledge, informativeness, harmlessness. Did you mean `style`?"),
        ("style: [a, b]", "1: style: found a list of 2. Allowed: sub-dimensions by name."),
        ("style:\n  new: {preferences: [x]}", "2: style.new.meaning: missing. Say in a few words what it is about: the model sees it."),
        ("style:\n  new: {meaning: m}", "2: style.new.preferences: missing. Name at least one"),
        ("style:\n  new: {meaning: m, preferences: {}}", "2: style.new.preferences: found a section. Name at least one"),
        ("style:\n  new: {meaning: m, preferences: {x: 3}}", "2: style.new.preferences.x: found 3. Allowed: a description, or nothing."),
        ("style:\n  new: {meaning: m, preferences: [3]}", "style.new.preferences: found 3. Allowed: texts."),
        ("style:\n  new: text", "2: style.new: found 'text'. Allowed: a section with `meaning` and `preferences`."),
        ("style:\n  new: {meanin: m, preferences: [x]}", "2: style.new.meanin: unknown key. Allowed: meaning, preferences. Did you mean `meaning`?"),
        ("style:\n  new: {meaning: m, preferences: ['dry WIT']}", "style.new.preferences.dry WIT: is also in tone, apart from blanks and punctuation."),
        ("style:\n  new:\n    meaning: m\n    preferences:\n      Ab c:\n      ab c!:", "style.new.preferences.ab c!: is also here"),
        ("style:\n  tone:\n  tone:", "given twice, first in"),
        ("", "empty. Required keys: style"),
        ("a: b: c", "not valid YAML"),
    ],
)  # fmt: skip
def test_errors_in_a_file_are_reported_with_their_lines(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as failure:
        load_hierarchy(path)
    assert message in str(failure.value)
    assert "mine.yaml" in str(failure.value)


def test_too_few_preferences_for_different_sets_are_an_error() -> None:
    with pytest.raises(
        UserError, match=r"7 sets of an instruction take 4 different preferences of harmlessness.s0, which has 3"
    ):
        PreferencePlan(hierarchy_of([7, 7, 7, 2], 3), 7, 0)
