"""Conditions of measurements: settings that must be equal before two results are compared."""

import json
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown"
"""Value of a condition that a file doesn't record, such as files of earlier versions."""

Conditions = Mapping[str, Any]
_SHOWN = 3
"""Keys of a mapping that are shown with both values."""


class Checksum(str):
    """Checksum of contents. Two that differ are named without their values, and only if nothing else explains it."""

    __slots__ = ()


def recorded_differences(first: Conditions, second: Conditions) -> list[str]:
    """Return `name is 1 and 2` for each condition that both sides record and that differs."""
    return [
        describe_difference(name, first[name], second[name])
        for name in first
        if name in second and UNKNOWN not in (first[name], second[name]) and not _same(first[name], second[name])
    ]


def all_differences(first: Conditions, second: Conditions, names: tuple[str, str] = ("A", "B")) -> list[str]:
    """Return `name is 1 and 2 (A and B)` for each setting that differs, recorded or not; `names`: of the sides."""
    return [
        f"{describe_difference(name, first.get(name), second.get(name))} ({names[0]} and {names[1]})"
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


def describe_difference(name: str, first: Any, second: Any) -> str:
    """Return `name is 1 and 2`; of mappings, `name: key is 1 and 2, ...` with the keys that differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
        keys = [key for key in keys if not isinstance(first.get(key), Checksum)] or keys
        texts = [describe_difference(key, first.get(key), second.get(key)) for key in keys[:_SHOWN]]
        more = f" (and {len(keys) - _SHOWN} more)" if len(keys) > _SHOWN else ""
        return f"{name}: {', '.join(texts)}{more}"
    if isinstance(first, Checksum) or isinstance(second, Checksum):
        return f"{name} differ" if first and second else f"{name} are recorded for one of the two"
    return f"{name} is {_format_value(first)} and {_format_value(second)}"


def _format_value(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + " ..."
