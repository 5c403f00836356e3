"""Hierarchy of preferences, and the plan of which part of it each preference set takes.

    dimension -> sub-dimension -> preference -> description
    style        tone             Dry wit       The answer ...

A set has one preference of each of the four dimensions. Its sub-dimensions follow only from the seed, the instruction's
number and the set's number, not from earlier answers: they are balanced over the collection in whatever order answers
arrive, and the same after a restart.

Per dimension, the sets of all instructions in sequence are dealt sub-dimensions from shuffled decks that hold each one
once. After any number of sets, two counts differ by at most one. If an instruction spans two decks, the second deck
begins with the sub-dimensions that the first has not given this instruction: siblings share a sub-dimension only if
there are fewer sub-dimensions than sets, and then as rarely as possible.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.datagen.text_units import split_words
from train.errors import UserError
from train.recipe.yaml_document import Document, KeyPath, closest_match, describe_value, did_you_mean, suggest_files

DIMENSIONS = ("style", "background_knowledge", "informativeness", "harmlessness")
"""Dimensions of the published data set, in its order; the Bench has a rubric for each."""

OURS = Path(__file__).with_name("hierarchy.yaml")
EXAMPLES_SHOWN = 3
"""Preferences of a sub-dimension in the prompt that proposes one."""


@dataclass(frozen=True, slots=True)
class SubDimension:
    """One aspect of a dimension. `preferences`: each with its description, or None without one."""

    dimension: str
    name: str
    meaning: str
    preferences: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class PlannedPreference:
    """Part of the hierarchy that a set takes from one dimension.

    `preference`: one of the sub-dimension's, for sets without proposed preferences. `examples`: a few of them.
    """

    sub: SubDimension
    preference: str
    examples: tuple[str, ...]

    @property
    def dimension(self) -> str:
        """Name of the dimension."""
        return self.sub.dimension

    @property
    def subdimension(self) -> str:
        """Name of the sub-dimension."""
        return self.sub.name

    def with_text(self, text: str) -> "Preference":
        """Return a preference of this sub-dimension."""
        return Preference(self.dimension, self.subdimension, text)


@dataclass(frozen=True, slots=True)
class Preference:
    """One of the four preferences of a set, in the columns of the published data set."""

    dimension: str
    subdimension: str
    preference: str
    description: str = ""


Hierarchy = Mapping[str, Mapping[str, SubDimension]]
"""Sub-dimensions by dimension and name."""


def normalize_words(text: str) -> str:
    """Return a text without case, accents and punctuation: equal for texts that differ in nothing else."""
    return " ".join(split_words(text)) or " ".join(text.casefold().split())


def load_hierarchy(file: str | Path | None = None, *, ours: bool = True) -> Hierarchy:
    """Return our hierarchy, that of `file`, or ours extended by `file`.

    Raises UserError with all errors in the file, each with its line.
    """
    if file is not None and not Path(file).is_file():
        raise UserError(f"hierarchy.file: {file}: there is no such file.{suggest_files(str(file))}")
    hierarchy: dict[str, dict[str, SubDimension]] = {dimension: {} for dimension in DIMENSIONS}
    for path in ((OURS,) if ours else ()) + ((Path(file),) if file is not None else ()):
        for sub in _read(path, hierarchy):
            hierarchy[sub.dimension][sub.name] = sub
    empty = [dimension for dimension in DIMENSIONS if not hierarchy[dimension]]
    if empty:
        raise UserError(
            f"{file or 'hierarchy'}: no sub-dimension of {', '.join(empty)}. A set has one preference of each of the "
            "four dimensions: add some, or leave `hierarchy.ours: true`, which adds ours."
        )
    return hierarchy


def _read(path: Path, base: Hierarchy) -> Iterator[SubDimension]:
    """Yield the sub-dimensions of a file, each extending the one of its name in `base`. Raises UserError."""
    document = Document(path, DIMENSIONS)
    read: list[SubDimension] = []
    for dimension, subs in document.tree.items():
        if dimension not in DIMENSIONS:
            suggestion = did_you_mean(closest_match(dimension, DIMENSIONS, 0.6))
            document.add_error((dimension,), f"unknown dimension. Allowed: {', '.join(DIMENSIONS)}.{suggestion}")
        elif not isinstance(subs, dict) or not subs:
            document.add_error((dimension,), f"found {describe_value(subs)}. Allowed: sub-dimensions by name.")
        else:
            read += [
                _parse_subdimension(document, dimension, name, content, base[dimension].get(name))
                for name, content in subs.items()
            ]
    _refuse_duplicates(document, read, base)
    document.raise_errors()
    yield from read


def _parse_subdimension(
    document: Document, dimension: str, name: str, content: Any, base: SubDimension | None
) -> SubDimension:
    path: KeyPath = (dimension, name)
    if not isinstance(content, dict):
        document.add_error(
            path, f"found {describe_value(content)}. Allowed: a section with `meaning` and `preferences`."
        )
        content = {"meaning": "-", "preferences": {"-": None}}
    for key in content.keys() - {"meaning", "preferences"}:
        suggestion = did_you_mean(closest_match(key, ("meaning", "preferences"), 0.6))
        document.add_error((*path, key), f"unknown key. Allowed: meaning, preferences.{suggestion}")
    meaning = content.get("meaning", base.meaning if base else None)
    if not isinstance(meaning, str) or not meaning.strip():
        value = f"found {describe_value(meaning)}" if "meaning" in content else "missing"
        document.add_error((*path, "meaning"), f"{value}. Say in a few words what it is about: the model sees it.")
        meaning = ""
    preferences = _parse_preferences(document, path, content, base)
    merged = {**(base.preferences if base else {})}
    for text, description in preferences.items():
        same = next((kept for kept in merged if normalize_words(kept) == normalize_words(text)), None) if base else None
        merged[same or text] = description or (merged[same] if same else None)
    return SubDimension(dimension, name, " ".join(meaning.split()), merged)


def _parse_preferences(
    document: Document, path: KeyPath, content: Mapping[str, Any], base: SubDimension | None
) -> dict[str, str | None]:
    """Return the preferences of a sub-dimension with their descriptions; note errors in the document."""
    preferences = content.get("preferences", {} if base else None)
    path = (*path, "preferences")
    if isinstance(preferences, list):
        if invalid := [text for text in preferences if not isinstance(text, str)]:
            document.add_error(path, f"found {describe_value(invalid[0])}. Allowed: texts.")
        preferences = {str(text): None for text in preferences}
    if not isinstance(preferences, dict) or not (preferences or base):
        value = f"found {describe_value(preferences)}" if "preferences" in content else "missing"
        document.add_error(path, f"{value}. Name at least one, each with its description or nothing.")
        preferences = {}
    for text, description in preferences.items():
        if not text.strip() or not isinstance(description, str | None):
            value = describe_value(description) if text.strip() else "an empty preference"
            document.add_error((*path, text), f"found {value}. Allowed: a description, or nothing.")
    return preferences


def _refuse_duplicates(document: Document, read: Sequence[SubDimension], base: Hierarchy) -> None:
    """Note preferences that occur twice in one dimension: siblings must differ."""
    own = {(sub.dimension, sub.name) for sub in read}
    others = [sub for subs in base.values() for sub in subs.values() if (sub.dimension, sub.name) not in own]
    first: dict[tuple[str, str], str] = {}
    for sub in (*others, *read):
        for text in sub.preferences:
            before = first.setdefault((sub.dimension, normalize_words(text)), sub.name)
            is_repeated = sum(normalize_words(other) == normalize_words(text) for other in sub.preferences) > 1
            if before != sub.name or is_repeated:
                where = f"in {before}" if before != sub.name else "here"
                path = (sub.dimension, sub.name, "preferences", text)
                document.add_error(path, f"is also {where}, apart from blanks and punctuation. Keep one of them.")


class PreferencePlan:
    """Plan of the sub-dimensions and preferences that the sets of each instruction take.

    Raises UserError if a dimension has too few preferences for the number of sets.
    """

    def __init__(self, hierarchy: Hierarchy, sets: int, seed: int) -> None:
        self.hierarchy, self.sets, self.seed = hierarchy, sets, seed
        for dimension, subs in hierarchy.items():
            needed = math.ceil(sets / len(subs))
            for sub in subs.values():
                if len(sub.preferences) < needed:
                    raise UserError(
                        f"sets_per_instruction: {sets} sets of an instruction take {needed} different preferences of "
                        f"{dimension}.{sub.name}, which has {len(sub.preferences)}. Add some, or other sub-dimensions "
                        "of this dimension, to the hierarchy, or take fewer sets."
                    )

    def sets_of(self, instruction: int) -> list[list[PlannedPreference]]:
        """Return the planned preferences of each set of an instruction (numbered from 0), one per dimension."""
        by_dimension = [self._plan_dimension(dimension, instruction) for dimension in DIMENSIONS]
        return [list(planned) for planned in zip(*by_dimension, strict=True)]

    def _plan_dimension(self, dimension: str, instruction: int) -> list[PlannedPreference]:
        subs = self.hierarchy[dimension]
        names = sorted(subs)
        period = math.lcm(len(names), self.sets)  # after this many sets, decks and instructions end together
        block, start = divmod(instruction * self.sets, period)
        dealt = self._deal_period(dimension, names, block, period)[start : start + self.sets]
        planned = []
        for number, name in enumerate(dealt, instruction * self.sets):
            sub = subs[name]
            rng = random.Random(f"{self.seed} examples {dimension} {number}")
            examples = rng.sample(sorted(sub.preferences), min(EXAMPLES_SHOWN, len(sub.preferences)))
            planned.append(PlannedPreference(sub, self._preference(sub, number // len(names)), tuple(examples)))
        return planned

    def _deal_period(self, dimension: str, names: Sequence[str], block: int, period: int) -> list[str]:
        """Return the sub-dimensions of one period of sets."""
        rng = random.Random(f"{self.seed} sub-dimensions {dimension} {block}")
        dealt: list[str] = []
        while len(dealt) < period:
            deck = rng.sample(names, len(names))
            started = len(dealt) % self.sets
            if started:  # the instruction continues from the last deck: what it has least of comes first
                counts = Counter(dealt[-started:])
                missing = min(self.sets - started, len(deck))
                first = sorted(deck, key=lambda name: counts[name])[:missing]
                deck = first + [name for name in deck if name not in first]
            dealt += deck
        return dealt

    def _preference(self, sub: SubDimension, times: int) -> str:
        """Return the preference after `times` uses of the sub-dimension; none is repeated before all were used."""
        preferences = sorted(sub.preferences)
        block, index = divmod(times, len(preferences))
        # If siblings can share the sub-dimension, all blocks have the same order: any run of uses differs.
        is_shared = self.sets > len(self.hierarchy[sub.dimension])
        rng = random.Random(f"{self.seed} preferences {sub.dimension} {sub.name} {0 if is_shared else block}")
        return rng.sample(preferences, len(preferences))[index]
