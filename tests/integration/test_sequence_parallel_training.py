"""Sequence parallelism: processes that share each packed sequence give the model, metrics and counts of one process.

In float32 on CPU processes. Documents cross the borders between processes, and lengths are no multiples of 4.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from ranks import launch
from small_runs import read_metrics, write_recipe, write_rows
from test_sharded_training import EPSILON, LEARNING_RATE, NOISE_OF_LOSS, SAVED_AT, STEPS, Trained, compare

pytest.importorskip("deepspeed")

SEQUENCES = 4
"""Sequences of a step, in every setting."""


@dataclass(frozen=True)
class Setting:
    """Processes, of which `shared` train each sequence together."""

    processes: int = 1
    shared: int = 1
    config: str | None = None
    lora: bool = False
    packed: bool = True

    @property
    def name(self) -> str:
        kind = Path(self.config or "ddp").stem
        return f"{kind}-{self.processes}-shared-{self.shared}-{'lora' if self.lora else 'full'}{'' if self.packed else '-rows'}"


@pytest.fixture(scope="module")
def train(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Return a function that trains a setting once; with `resume_with`, other processes continue half-way."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 40, seed=11, system=20, user=10, answers=(1, 5, 40, 120))
    held_out = write_rows(root / "held-out.jsonl", 9, seed=5, system=20, user=10, answers=(1, 5, 40, 120))
    runs: dict[tuple[Setting, Setting | None], Trained] = {}

    def run(setting: Setting, resume_with: Setting | None = None) -> Trained:
        if (setting, resume_with) in runs:
            return runs[setting, resume_with]
        folder, ranks = root / setting.name, resume_with or setting
        if resume_with:
            run(setting)
            folder = root / f"{setting.name}-then-{resume_with.name}"
            shutil.copytree(root / setting.name / f"checkpoint-{SAVED_AT}", folder / f"checkpoint-{SAVED_AT}")
        recipe = write_recipe(
            root / f"{folder.name}.yaml",
            tiny_model,
            rows,
            folder,
            data={"max_length": 250, "validation": [{"path": str(held_out)}], "packing": setting.packed},
            training={
                "gradient_checkpointing": True,
                "learning_rate": LEARNING_RATE,
                "adam_epsilon": EPSILON,
                "lr_scheduler_type": "linear",
                "gradient_accumulation_steps": SEQUENCES * ranks.shared // ranks.processes,
                "per_device_eval_batch_size": 1,
                "max_steps": STEPS,
                "save_steps": SAVED_AT,
                "eval_strategy": "steps",
                "eval_steps": STEPS,
            },
            adapter={"r": 4, "modules_to_save": ["lm_head"]} if setting.lora else None,
            system_gain={"rows": 4},
        )
        arguments = ["--recipe", recipe, f"model.sequence_parallel={ranks.shared}"]
        outcome = launch(ranks.processes, ranks.config, *arguments, logs=root / f"{folder.name}-logs")
        assert "Warning" not in "".join(outcome.succeeded().output)
        assert ("are isolated: replacing one" in outcome.output[0]) is (setting.packed or ranks.shared > 1)
        runs[setting, resume_with] = Trained.read(folder, lora=setting.lora)
        return runs[setting, resume_with]

    return run


def metrics(trained: Trained) -> tuple[list[dict], dict]:
    """Return the lines of the steps, and that of the evaluation."""
    lines = read_metrics(trained.folder)
    (evaluation,) = [line for line in lines if "eval_loss" in line]
    return [line for line in lines if "loss" in line], evaluation


SETTINGS = [
    Setting(2, 2, lora=True),
    Setting(2, 2, packed=False),
    Setting(4, 2, "zero3.yaml"),
    Setting(4, 2, "fsdp2.yaml"),
]


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_shared_sequence_trains_the_model_of_one_process(setting: Setting, train: Callable[..., Trained]) -> None:
    alone, shared = train(Setting(lora=setting.lora, packed=setting.packed)), train(setting)
    assert alone.losses[0] - alone.losses[-1] > 0.1
    loss, norm, weights = compare(shared, alone)
    assert loss < NOISE_OF_LOSS
    assert norm < NOISE_OF_LOSS
    assert weights < 1

    expected, actual = metrics(alone), metrics(shared)
    for ours, theirs in zip(actual[0], expected[0], strict=True):
        assert ours["num_tokens"] == theirs["num_tokens"]
        assert (ours["epoch"], ours["step"]) == (theirs["epoch"], theirs["step"])
        assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"], rel=1e-6)
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-5)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy", "eval_system_gain"):
        assert actual[1][name] == pytest.approx(expected[1][name], rel=1e-5)


RESUMED = [
    (Setting(), Setting(2, 2)),
    (Setting(4, 2, "zero3.yaml"), Setting(4, 4, "zero3.yaml")),
]


@pytest.mark.parametrize(("first", "then"), RESUMED, ids=lambda setting: setting.name)
def test_a_run_resumes_with_sequences_shared_otherwise(
    first: Setting, then: Setting, train: Callable[..., Trained]
) -> None:
    whole, resumed = train(first), train(first, then)
    loss, norm, weights = compare(resumed, whole)
    assert loss < NOISE_OF_LOSS
    assert norm < NOISE_OF_LOSS
    assert weights < 1
    expected, actual = metrics(whole), metrics(resumed)
    assert [line["num_tokens"] for line in actual[0]] == [line["num_tokens"] for line in expected[0]]
    assert actual[1]["eval_loss"] == pytest.approx(expected[1]["eval_loss"], rel=1e-5)


def train_without_exchange(recipe: str) -> None:
    """Try to train with a kernel that each rank calls on its own tokens alone."""
    from test_trainer import make_trainer
    from transformers import AttentionInterface

    from train.errors import UserError
    from train.recipe import load_recipe

    trainer = make_trainer(load_recipe(recipe, ["model.sequence_parallel=2"]))
    AttentionInterface.register("sdpa", AttentionInterface()["sdpa"].kernel)
    with pytest.raises(UserError, match=r"in a pack and .* Write `model\.sequence_parallel: 1`\."):
        trainer.train()


def test_a_model_that_does_not_exchange_tokens_is_refused(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    launch(2, None, recipe_file(), job=train_without_exchange, logs=tmp_path / "logs").succeeded()
