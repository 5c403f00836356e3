"""Rows of the built-in set that a run asks: all, or a prefix that is balanced over rules, splits and tactics."""

from collections import defaultdict
from collections.abc import Collection, Sequence
from itertools import zip_longest

from train.pressure.evaluation_set import PressureRow
from train.pressure.rules import Split
from train.pressure.tactics import tactics


def select_rows(
    rows: Sequence[PressureRow],
    settings: Collection[str],
    split: Split | None = None,
    per_setting: int | None = None,
) -> list[PressureRow]:
    """Return the rows of `settings` and of one split (None = both), at most `per_setting` of each setting.

    A prefix takes one tactic of each group, in turns, then the next tactic. Groups are ordered so that each rule comes
    once before any comes twice, in turns of its splits. So a prefix of any setting has rows of the same groups as the
    same prefix of the reference setting, while there are groups left.
    """
    by_group: dict[str, dict[tuple[str, str], PressureRow]] = defaultdict(dict)
    for row in rows:
        if split is None or row.split == split:
            by_group[row.group][row.pressure.setting, row.pressure.tactic] = row
    rounds = _rounds(by_group)
    selected = []
    for setting in dict.fromkeys(settings):
        names = tactics(setting)
        of_setting = [
            by_group[group][setting, names[(position + number + turn) % len(names)]]
            for turn in range(len(names))
            for number, groups in enumerate(rounds)
            for position, group in enumerate(groups)
        ]
        selected += of_setting[:per_setting]
    return selected


def _rounds(by_group: dict[str, dict[tuple[str, str], PressureRow]]) -> list[list[str]]:
    """Return rounds of groups with one group of each rule. A rule's groups alternate between its splits."""
    by_rule: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for group, of_group in by_group.items():
        row = next(iter(of_group.values()))
        by_rule[row.rule.name][row.split].append(group)
    columns = []
    for number, of_split in enumerate(by_rule.values()):
        splits = list(of_split.values())
        splits = splits[number % len(splits) :] + splits[: number % len(splits)]  # half of the rules begin with each
        columns.append([group for pair in zip_longest(*splits) for group in pair if group])
    return [[group for group in groups if group] for groups in zip_longest(*columns)]
