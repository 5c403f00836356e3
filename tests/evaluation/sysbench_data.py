"""Conversations in SysBench's format, written for the tests: the published ones have no licence."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TYPES = ("format", "style")


def conversation(number: int, criteria: Sequence[int] = (2, 1, 2, 1, 2), **changes: Any) -> dict[str, Any]:
    """Return a conversation as in the file: `criteria` of each turn, odd numbers dependent, turns 3 and 5 misaligned."""
    system = f"System message {number}."
    users = [f"Conversation {number}, user turn {turn}." for turn in range(1, 6)]
    messages = [{"role": "system", "content": system}]
    for turn, user in enumerate(users, 1):
        messages += [
            {"role": "user", "content": user},
            {"role": "assistant", "content": f"Reference {number}.{turn}."},
        ]
    infos = {
        user: {
            "alignment": "misalign" if turn in (3, 5) else "align",
            "criteria": {
                str(each): {
                    "criteria_id": each,
                    "criteria_content": f"Criterion {number}.{turn}.{each} is met.",
                    "criteria_type": TYPES[each % 2],
                }
                for each in range(1, count + 1)
            },
        }
        for (turn, user), count in zip(enumerate(users, 1), criteria, strict=True)
    }
    return {
        "system_id": number,
        "system_prompt": system,
        "rounds_related": number % 2 == 1,
        "messages": messages,
        "prompt_infos": infos,
        "a further key": {"of": "the file"},
    } | changes


def write_file(path: Path, rows: Any) -> Path:
    """Write the rows as the published file is: one JSON list."""
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=2), encoding="utf-8")
    return path
