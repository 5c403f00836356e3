"""Conditions of measurements: settings that must be equal before two results are compared."""

import json
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown"
"""Value of a condition that a file doesn't record, such as files of earlier versions."""

Conditions = Mapping[str, Any]


def recorded_differences(first: Conditions, second: Conditions) -> list[str]:
    """Return `name is 1 and 2` for each condition that both sides record and that differs."""
    return [
        f"{name} {describe_difference(first[name], second[name])}"
        for name in first
        if name in second and UNKNOWN not in (first[name], second[name]) and not _same(first[name], second[name])
    ]


def all_differences(first: Conditions, second: Conditions, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Return `name is 1 and 2 (A and B)` for each setting that differs, recorded or not; `names`: of the sides."""
    return [
        f"{name} {describe_difference(first.get(name), second.get(name))} ({names[0]} and {names[1]})"
        for name in dict.fromkeys([*first, *second])
        if not _same(first.get(name), second.get(name))
    ]


def missing_conditions(first: Conditions, second: Conditions, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Return a sentence for each side (or both) that doesn't record some of the conditions."""
    missing: dict[str, list[str]] = {}
    for name in dict.fromkeys([*first, *second]):
        conditions = zip(names, (first, second), strict=True)
        sides = [side for side, recorded in conditions if recorded.get(name, UNKNOWN) == UNKNOWN]
        if sides:
            missing.setdefault(" and ".join(sides), []).append(name)
    return [f"not recorded for {sides}, so it may differ: {', '.join(listed)}" for sides, listed in missing.items()]


def _same(first: Any, second: Any) -> bool:
    """Return whether two values are equal; a missing value of a mapping equals None."""
    if isinstance(first, dict) and isinstance(second, dict):
        return all(first.get(key) == second.get(key) for key in [*first, *second])
    return bool(first == second)


def describe_difference(first: Any, second: Any) -> str:
    """Return the difference of two values as text; of mappings, that of the first key that differs."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
        text = f"{keys[0]} is {_format_value(first.get(keys[0]))} and {_format_value(second.get(keys[0]))}"
        return text if len(keys) == 1 else f"{text} (and {len(keys) - 1} more)"
    return f"is {_format_value(first)} and {_format_value(second)}"


def _format_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + " ..."
