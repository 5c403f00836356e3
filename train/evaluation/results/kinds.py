"""Kinds of results: the file of each command, a test of its record, and its readers."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.evaluation.results.bench import read_bench
from train.evaluation.results.gain import read_gain, read_gain_before
from train.evaluation.results.harness import read_harness
from train.evaluation.results.hierarchy import read_hierarchy
from train.evaluation.results.ifeval import read_ifeval
from train.evaluation.results.measures import Record, Results
from train.evaluation.results.rules import read_rules, read_rules_before
from train.evaluation.results.sysbench import read_sysbench
from train.evaluation.results.turns import read_turns


@dataclass(frozen=True)
class Kind:
    """A kind of result: its file, a test of its record, and its readers."""

    file: str
    matches: Callable[[Record], bool]
    read: Callable[[str, Path, Record], Results]
    read_before: Callable[[str, Path, Record], Results | None] | None = None


def has_kind(kind: str) -> Callable[[Record], bool]:
    """Return a test of the `kind` in a record."""
    return lambda record: record.get("kind") == kind


KINDS = {
    "gain": Kind("gain.json", lambda record: "models" in record and "left_out" in record, read_gain, read_gain_before),
    "rules": Kind(
        "adherence.json", lambda record: bool({"wording", "rule"} & set(record)), read_rules, read_rules_before
    ),
    "ifeval": Kind("ifeval.json", has_kind("ifeval"), read_ifeval),
    "hierarchy": Kind("hierarchy.json", has_kind("hierarchy"), read_hierarchy),
    "turns": Kind("turns.json", has_kind("turns"), read_turns),
    "sysbench": Kind("sysbench.json", has_kind("sysbench"), read_sysbench),
    "bench": Kind("bench.json", lambda record: "judge" in record and "by_dimension" in record, read_bench),
    "harness": Kind("harness.json", has_kind("harness"), read_harness),
}
