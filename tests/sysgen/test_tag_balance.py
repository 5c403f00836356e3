"""Balance of tags: which rows are reminded of a rare tag."""

import random
from pathlib import Path

import pytest

from train.sysgen.config import SysgenConfig
from train.sysgen.result import RowResult
from train.sysgen.tag_balance import LAG, TagBalance
from train.sysgen.tags import Phrase, TaggedMessage


def config(target: float, folder: Path) -> SysgenConfig:
    return SysgenConfig.model_validate(
        {
            "model": "m",
            "servers": [{"base_url": "http://localhost/v1"}],
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "tags": {"target_share": {"Tool": target}},
            "output_dir": str(folder),
        }
    )


def shares(
    settings: SysgenConfig, unasked: float, reminded: float, rows: int, at_work: int = LAG - 1
) -> tuple[float, float]:
    """Return the shares of the tag and of reminders in the later half of the rows, for a model with these shares.

    Results are added in order and as late as possible: `at_work` rows behind the row that begins.
    """
    balance, rng = TagBalance(settings), random.Random(3)
    waiting: list[RowResult] = []
    has: list[bool] = []
    asked: list[bool] = []
    for index in range(rows):
        result = RowResult(index, "here", reminded_of=balance.draw_reminders(index))
        has.append(rng.random() < (reminded if result.reminded_of else unasked))
        asked.append(bool(result.reminded_of))
        result.message = TaggedMessage((Phrase("Role", "r"), *([Phrase("Tool", "t")] if has[-1] else [])))
        waiting.append(result)
        if len(waiting) > at_work:
            balance.add(waiting.pop(0))
    half = rows // 2
    return sum(has[half:]) / half, sum(asked[half:]) / half


@pytest.mark.parametrize(
    ("target", "unasked", "reminded", "share", "asked"),
    [
        (0.4, 0.1, 2 / 3, 0.4, 0.3 / (2 / 3 - 0.1)),
        (0.3, 0.02, 0.9, 0.3, 0.28 / 0.88),
        (0.1, 0.3, 0.9, 0.3, 0.0),  # it comes more often by itself
        (0.8, 0.1, 0.2, 0.2, 1.0),  # and no more can be had without invention
    ],
)
def test_the_target_share_is_reached(
    tmp_path: Path, target: float, unasked: float, reminded: float, share: float, asked: float
) -> None:
    reached, draw_reminders = shares(config(target, tmp_path), unasked, reminded, 40_000)
    assert reached == pytest.approx(share, abs=0.015)
    assert draw_reminders == pytest.approx(asked, abs=0.02)


def test_the_number_of_rows_in_progress_changes_nothing(tmp_path: Path) -> None:
    results = {shares(config(0.4, tmp_path), 0.1, 0.7, 12_000, at_work) for at_work in (1, 100, LAG - 1)}
    assert len(results) == 1


def test_without_a_target_there_are_no_reminders(tmp_path: Path) -> None:
    settings = config(0.4, tmp_path)
    balance = TagBalance(settings.model_copy(update={"tags": type(settings.tags)()}))
    assert not any(balance.draw_reminders(index) for index in range(1_000))
