"""Keys of measurements: they decide which model is the best, or only what is reported."""

import pytest

from train.recipe.measurements import is_only_reported


@pytest.mark.parametrize(
    ("key", "metric", "expected"),
    [
        ("system_gain.rows", None, True),
        ("system_gain.rows", "eval_loss", True),
        ("system_gain.rows", "eval_system_gain", False),
        ("system_gain.rows", "eval_rules_followed", True),
        ("evaluation.rules", "eval_rules_followed", False),
        ("evaluation.max_new_tokens", "rules_followed", False),
        ("evaluation.turns", "eval_rules_followed", True),
        ("evaluation.rules", "eval_loss", True),
        ("evaluation.rules", "eval_system_accuracy", True),
        ("training.learning_rate", "eval_loss", False),
        ("data.validation", None, False),
    ],
)
def test_a_key_of_a_measurement_decides_only_by_its_own_metric(key: str, metric: str | None, expected: bool) -> None:
    assert is_only_reported(key, metric) is expected
