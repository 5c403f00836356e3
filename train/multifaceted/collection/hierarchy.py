"""The hierarchy of preferences, and which part of it each preference set is to come from.

    dimension -> sub-dimension -> preference -> description
    style        tone             Dry wit       The answer ...

A set has one preference of each of the four dimensions. Its sub-dimensions follow from the seed, the instruction's
number and the set's number alone, in no way from what was answered so far: so they are balanced over the whole
collection whatever order answers come in, and the same after a kill.

How: the sets of all instructions, one after another, are dealt sub-dimensions from shuffled decks that hold each of a
dimension once. After any number of sets two counts differ by at most one, the least that is possible. Where the sets
of an instruction lie in two decks, the second one begins with what the first has not given this instruction: siblings
never share a sub-dimension as long as there are enough, and else share one as rarely as can be.
"""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.datagen.words import words_of
from train.errors import UserError
from train.recipe.yaml_document import Document, KeyPath, closest_match, describe_value, did_you_mean, suggest_files

DIMENSIONS = ("style", "background_knowledge", "informativeness", "harmlessness")
"""Those of the hub's set, in its order; the Bench has a rubric for each."""

OURS = Path(__file__).with_name("hierarchy.yaml")
EXAMPLES_SHOWN = 3
"""Preferences of a sub-dimension that the model sees before it proposes one."""


@dataclass(frozen=True, slots=True)
class SubDimension:
    """One aspect of a dimension. `preferences`: each with its description, where it has one."""

    dimension: str
    name: str
    meaning: str
    preferences: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class Draw:
    """What a set takes from one dimension. `preference`: the one of the hierarchy, where none is proposed.

    `examples`: a few of the sub-dimension's preferences.
    """

    sub: SubDimension
    preference: str
    examples: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """One of the four of a set, as the hub's set has it."""

    dimension: str
    subdimension: str
    preference: str
    description: str = ""


Hierarchy = Mapping[str, Mapping[str, SubDimension]]
"""By dimension and name."""


def same_words(text: str) -> str:
    """What two texts share that differ in case, marks and punctuation alone."""
    return " ".join(words_of(text)) or " ".join(text.casefold().split())


def load_hierarchy(file: str | Path | None = None, *, ours: bool = True) -> Hierarchy:
    """Our hierarchy, or that of `file`, or ours with what `file` adds.

    Raises UserError with everything that is wrong with the file, each fault with its line.
    """
    if file is not None and not Path(file).is_file():
        raise UserError(f"hierarchy.file: {file}: there is no such file.{suggest_files(str(file))}")
    found: dict[str, dict[str, SubDimension]] = {dimension: {} for dimension in DIMENSIONS}
    for path in ((OURS,) if ours else ()) + ((Path(file),) if file is not None else ()):
        for sub in _read(path, found):
            found[sub.dimension][sub.name] = sub
    empty = [dimension for dimension in DIMENSIONS if not found[dimension]]
    if empty:
        raise UserError(
            f"{file or 'hierarchy'}: no sub-dimension of {', '.join(empty)}. A set has one preference of each of the "
            "four dimensions: add some, or leave `hierarchy.ours: true`, which adds ours."
        )
    return found


def _read(path: Path, known: Hierarchy) -> Iterator[SubDimension]:
    """The sub-dimensions of a file, with what `known` already has of them. Raises UserError."""
    document = Document(path, DIMENSIONS)
    found: list[SubDimension] = []
    for dimension, subs in document.tree.items():
        if dimension not in DIMENSIONS:
            meant = did_you_mean(closest_match(dimension, DIMENSIONS, 0.6))
            document.add_error((dimension,), f"no dimension. Allowed: {', '.join(DIMENSIONS)}.{meant}")
        elif not isinstance(subs, dict) or not subs:
            document.add_error((dimension,), f"found {describe_value(subs)}. Allowed: sub-dimensions by their names.")
        else:
            found += [
                _sub_dimension(document, dimension, name, content, known[dimension].get(name))
                for name, content in subs.items()
            ]
    _refuse_twins(document, found, known)
    document.raise_errors()
    yield from found


def _sub_dimension(
    document: Document, dimension: str, name: str, content: Any, known: SubDimension | None
) -> SubDimension:
    here: KeyPath = (dimension, name)
    if not isinstance(content, dict):
        document.add_error(
            here, f"found {describe_value(content)}. Allowed: a section with `meaning` and `preferences`."
        )
        content = {"meaning": "-", "preferences": {"-": None}}
    for key in content.keys() - {"meaning", "preferences"}:
        meant = did_you_mean(closest_match(key, ("meaning", "preferences"), 0.6))
        document.add_error((*here, key), f"unknown key. Allowed: meaning, preferences.{meant}")
    meaning = content.get("meaning", known.meaning if known else None)
    if not isinstance(meaning, str) or not meaning.strip():
        found = f"found {describe_value(meaning)}" if "meaning" in content else "missing"
        document.add_error((*here, "meaning"), f"{found}. Say in a few words what it is about: the model sees it.")
        meaning = ""
    preferences = content.get("preferences", {} if known else None)
    if isinstance(preferences, list):
        if bad := [one for one in preferences if not isinstance(one, str)]:
            document.add_error((*here, "preferences"), f"found {describe_value(bad[0])}. Allowed: texts.")
        preferences = {str(one): None for one in preferences}
    if not isinstance(preferences, dict) or not (preferences or known):
        found = f"found {describe_value(preferences)}" if "preferences" in content else "missing"
        document.add_error((*here, "preferences"), f"{found}. Name at least one, each with its description or nothing.")
        preferences = {}
    for text, description in preferences.items():
        if not text.strip() or not isinstance(description, str | None):
            what = describe_value(description) if text.strip() else "an empty preference"
            document.add_error((*here, "preferences", text), f"found {what}. Allowed: a description, or nothing.")
    merged = {**(known.preferences if known else {})}
    for text, description in preferences.items():
        twin = next((one for one in merged if same_words(one) == same_words(text)), None) if known else None
        merged[twin or text] = description or (merged[twin] if twin else None)
    return SubDimension(dimension, name, " ".join(meaning.split()), merged)


def _refuse_twins(document: Document, found: Sequence[SubDimension], known: Hierarchy) -> None:
    """Siblings are to differ: no preference may stand twice in one dimension."""
    mine = {(sub.dimension, sub.name) for sub in found}
    others = [sub for subs in known.values() for sub in subs.values() if (sub.dimension, sub.name) not in mine]
    first: dict[tuple[str, str], str] = {}
    for sub in (*others, *found):
        for text in sub.preferences:
            before = first.setdefault((sub.dimension, same_words(text)), sub.name)
            again = sum(same_words(one) == same_words(text) for one in sub.preferences) > 1
            if before != sub.name or again:
                where = f"in {before}" if before != sub.name else "here"
                path = (sub.dimension, sub.name, "preferences", text)
                document.add_error(path, f"stands {where} too, blanks and marks aside. Keep one of them.")


class Plan:
    """Which sub-dimensions the sets of each instruction take, and which preferences of the hierarchy.

    Raises UserError where a dimension has too few preferences for so many sets that differ.
    """

    def __init__(self, hierarchy: Hierarchy, sets: int, seed: int) -> None:
        self.hierarchy, self.sets, self.seed = hierarchy, sets, seed
        for dimension, subs in hierarchy.items():
            most = math.ceil(sets / len(subs))
            for sub in subs.values():
                if len(sub.preferences) < most:
                    raise UserError(
                        f"sets_per_instruction: {sets} sets of an instruction take {most} different preferences of "
                        f"{dimension}.{sub.name}, which has {len(sub.preferences)}. Add some, or other sub-dimensions "
                        "of this dimension, to the hierarchy, or take fewer sets."
                    )

    def of(self, instruction: int) -> list[list[Draw]]:
        """For each set of an instruction, numbered from 0, what it takes from each dimension."""
        by_dimension = [self._of_dimension(dimension, instruction) for dimension in DIMENSIONS]
        return [list(draws) for draws in zip(*by_dimension, strict=True)]

    def _of_dimension(self, dimension: str, instruction: int) -> list[Draw]:
        subs = self.hierarchy[dimension]
        names = sorted(subs)
        period = math.lcm(len(names), self.sets)  # after so many sets, decks and instructions end together
        block, place = divmod(instruction * self.sets, period)
        dealt = self._dealt(dimension, names, block, period)[place : place + self.sets]
        draws = []
        for number, name in enumerate(dealt, instruction * self.sets):
            sub = subs[name]
            chance = random.Random(f"{self.seed} examples {dimension} {number}")
            examples = chance.sample(sorted(sub.preferences), min(EXAMPLES_SHOWN, len(sub.preferences)))
            draws.append(Draw(sub, self._preference(sub, number // len(names)), tuple(examples)))
        return draws

    def _dealt(self, dimension: str, names: Sequence[str], block: int, period: int) -> list[str]:
        """The sub-dimensions of one period of sets."""
        chance = random.Random(f"{self.seed} sub-dimensions {dimension} {block}")
        dealt: list[str] = []
        while len(dealt) < period:
            deck = chance.sample(names, len(names))
            begun = len(dealt) % self.sets
            if begun:  # an instruction in the middle: what it has least of comes first
                had = Counter(dealt[-begun:])
                rest = min(self.sets - begun, len(deck))
                first = sorted(deck, key=lambda name: had[name])[:rest]
                deck = first + [name for name in deck if name not in first]
            dealt += deck
        return dealt

    def _preference(self, sub: SubDimension, times: int) -> str:
        """The preference when the sub-dimension was drawn so many times before; none comes twice before all came."""
        preferences = sorted(sub.preferences)
        block, place = divmod(times, len(preferences))
        # Where siblings may share the sub-dimension, one order for all blocks: any run of draws differs.
        shared = self.sets > len(self.hierarchy[sub.dimension])
        chance = random.Random(f"{self.seed} preferences {sub.dimension} {sub.name} {0 if shared else block}")
        return chance.sample(preferences, len(preferences))[place]
