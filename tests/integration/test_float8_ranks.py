"""Emulated float8 layers on several processes: DDP and each of DeepSpeed's stages give the results of one process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import launch
from small_runs import read_metrics

pytest.importorskip("deepspeed")
pytest.importorskip("torchao.float8", reason="the package torchao is not installed (make test installs it)")


def train(recipe_file: str) -> int:
    """Train as a rank of train/sft.py does, with layers that emulate float8."""
    from train.data.chat.template import use_template
    from train.data.prepare import prepare
    from train.loop.arguments import training_arguments
    from train.loop.metrics_log import StepLog
    from train.loop.trainer import JanusTrainer
    from train.model.float8 import convert
    from train.model.load import load_model
    from train.model.tokenizer import load_tokenizer
    from train.preflight.start_screen import start_screen
    from train.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"float8": None})})
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    Path(recipe.output_dir).mkdir(exist_ok=True)
    data = prepare(recipe, tokenizer)
    arguments = training_arguments(recipe)
    model = load_model(plain)
    convert(model, recipe.model.float8, emulate=True)
    step_log = StepLog(recipe.output_dir)
    trainer = JanusTrainer(recipe, arguments, model, tokenizer, data, [step_log])
    print(start_screen(recipe, "chatml", data, trainer.model, arguments, width=10_000), flush=True)
    with step_log:
        trainer.train()
    trainer.save_model(recipe.output_dir)
    return 0


@pytest.fixture
def trained(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[list[str], list[dict]]]:
    """Return a function that trains: the lines of the start screen about float8, and the metrics of steps of 8 rows."""

    def run(processes: int, config: str | None, **sections: dict) -> tuple[list[str], list[dict]]:
        folder = tmp_path / f"{Path(config or 'plain').stem}-{processes}"
        training = {
            "bf16": True,
            "gradient_checkpointing": True,
            "per_device_train_batch_size": 8 // processes,
            "max_steps": 3,
            "num_train_epochs": ...,
        }
        recipe = recipe_file(
            model={"float8": "rowwise", "dtype": "bfloat16"},
            data={"packing": False},
            training=training,
            output_dir=str(folder),
            **sections,
        )
        outcome = launch(processes, config, recipe, logs=tmp_path / f"{folder.name}-logs", job=train).succeeded()
        lines = outcome.output[0].splitlines()
        place = next(number for number, line in enumerate(lines) if line.startswith("float8 "))
        metrics = read_metrics(folder)
        return lines[place : place + 2], [line for line in metrics if "loss" in line]

    return run


@pytest.mark.parametrize("sections", [{}, {"adapter": {"r": 4}}], ids=["full", "lora"])
@pytest.mark.parametrize("config", [None, "zero1.yaml", "zero2.yaml", "zero3.yaml"])
def test_ranks_compute_what_one_process_does(
    trained: Callable[..., tuple[list[str], list[dict]]], config: str | None, sections: dict
) -> None:
    shown, single = trained(1, None, **sections)
    shown_by_two, several = trained(2, config, **sections)
    assert "13 of 15 linear layers" in shown[0]
    assert shown_by_two == shown
    # Other batches give other sums in bfloat16, which may round to another number in float8; rows make 8 together.
    assert [step["loss"] for step in several] == pytest.approx([step["loss"] for step in single], rel=1e-2)
    assert [step["grad_norm"] for step in several] == pytest.approx([step["grad_norm"] for step in single], rel=2**-4)
