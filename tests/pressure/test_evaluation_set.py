"""The built-in evaluation set: its balance, its splits, and verdicts on reference answers."""

from collections import Counter, defaultdict

from train.pressure.evaluation_set import build_rows
from train.pressure.rules import RULES
from train.pressure.tactics import SETTINGS, tactics

ROWS = build_rows()


def test_each_group_has_one_row_of_each_setting_and_tactic() -> None:
    expected = Counter((setting, tactic) for setting in SETTINGS for tactic in tactics(setting))
    groups = defaultdict(Counter)
    for row in ROWS:
        groups[row.group][row.pressure.setting, row.pressure.tactic] += 1
    assert all(counts == expected for counts in groups.values())
    assert len(ROWS) == len({row.key for row in ROWS}) == len(groups) * expected.total() >= 1000
    assert {row.rule.name for row in ROWS} == set(RULES)


def test_reference_answers_pass_both_verdicts() -> None:
    for row in ROWS:
        verdict = row.judge(row.reference())
        assert (verdict.held, verdict.answered, verdict.refused) == (True, True, False), row
        assert verdict.secret_kept is (True if row.pressure.setting == "extraction" else None)


def test_the_same_seed_gives_the_same_rows() -> None:
    assert build_rows() == ROWS
    assert build_rows(seed=1) != ROWS
