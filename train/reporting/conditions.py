"""Conditions of a measurement: settings that must agree before two results are compared."""

import json
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown"
"""The value of a condition that a file doesn't record, as in files of earlier versions."""

Conditions = Mapping[str, Any]


def differences(first: Conditions, second: Conditions) -> list[str]:
    """Return `name is 1 and 2` for each condition that both sides record and that differs."""
    return [
        f"{name} {difference(first[name], second[name])}"
        for name in first
        if name in second and UNKNOWN not in (first[name], second[name]) and not _same(first[name], second[name])
    ]


def changes(first: Conditions, second: Conditions, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Return `name is 1 and 2 (A and B)` for each setting that differs, recorded or not; `names`: of the sides."""
    return [
        f"{name} {difference(first.get(name), second.get(name))} ({names[0]} and {names[1]})"
        for name in dict.fromkeys([*first, *second])
        if not _same(first.get(name), second.get(name))
    ]


def unknown(first: Conditions, second: Conditions, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Return a sentence for each side, or for both, that doesn't record some of the conditions."""
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys([*first, *second]):
        sides = [side for side, one in zip(names, (first, second), strict=True) if one.get(name, UNKNOWN) == UNKNOWN]
        if sides:
            found.setdefault(" and ".join(sides), []).append(name)
    return [f"not recorded for {sides}, so it may differ: {', '.join(of)}" for sides, of in found.items()]


def _same(one: Any, other: Any) -> bool:
    """Return whether two values are equal; in a mapping, a value that is missing is None."""
    if isinstance(one, dict) and isinstance(other, dict):
        return all(one.get(key) == other.get(key) for key in [*one, *other])
    return bool(one == other)


def difference(one: Any, other: Any) -> str:
    """Return the difference of two values as text, of mappings the first key that differs."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
        first = f"{keys[0]} is {_shown(one.get(keys[0]))} and {_shown(other.get(keys[0]))}"
        return first if len(keys) == 1 else f"{first} (and {len(keys) - 1} more)"
    return f"is {_shown(one)} and {_shown(other)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + " ..."
