"""Resume with sequences that another number of processes shares: a step keeps its sequences."""

from collections.abc import Callable
from pathlib import Path

import pytest

from train.errors import UserError
from train.loop.checkpoint.fingerprint import run_fingerprint
from train.loop.checkpoint.manifest import Checkpoint
from train.loop.checkpoint.resume import keep_sequences_per_step
from train.recipe import load_recipe

Keep = Callable[..., int]


@pytest.fixture
def keep(recipe_file: Callable[..., Path], tmp_path: Path) -> Keep:
    """Return a function that resumes a step of 8 sequences and returns the accumulation steps."""

    def resume(now: tuple[int, int], before: tuple[int, int | None], accumulation: int) -> int:
        """`now`, `before`: processes, and how many of them share a sequence; None = an older version's checkpoint."""
        training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
        recipe = load_recipe(recipe_file(training=training), [f"model.sequence_parallel={now[1]}"])
        manifest = {"sequences_per_step": 8, "processes": before[0], "run": run_fingerprint(recipe)}
        if before[1]:
            manifest["sequence_parallel"] = before[1]
        checkpoint = Checkpoint(tmp_path, manifest)
        return keep_sequences_per_step(recipe, checkpoint, [], now[0]).training["gradient_accumulation_steps"]

    return resume


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ((4, 1), (4, None), 1),
        ((4, 2), (4, None), 2),
        ((4, 4), (4, 2), 4),
        ((4, 1), (4, 4), 1),
        ((8, 2), (2, 2), 1),
        ((16, 4), (4, 1), 1),
    ],
)
def test_accumulation_keeps_the_sequences_of_a_step(
    now: tuple[int, int], before: tuple[int, int | None], expected: int, keep: Keep
) -> None:
    processes, shared = now
    assert processes // shared * 2 * expected == 8
    assert keep(now, before, expected) == expected
    if now != before and before != (4, None):
        assert keep(now, before, 7) == expected


def test_the_change_is_printed(keep: Keep, capsys: pytest.CaptureFixture[str]) -> None:
    keep((4, 4), (4, 2), 1)
    assert (
        "4 processes (4 for each sequence) instead of 4 (2 for each sequence): training.gradient"
        in capsys.readouterr().out
    )


def test_sequences_that_groups_cannot_divide_are_an_error(keep: Keep) -> None:
    with pytest.raises(
        UserError, match=r"which 6 processes \(2 for each sequence\) with batches of 2 can't share evenly"
    ):
        keep((6, 2), (4, 1), 1)
