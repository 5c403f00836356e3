"""Resumed settings: changes are in force from the first step; impossible ones are refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Trainer, get_scheduler
from trl import SFTConfig

from train.errors import UserError
from train.loop.checkpoint.manifest import read_checkpoint
from train.loop.checkpoint.resumed_settings import ResumedSettings
from train.recipe import load_recipe
from train.sft import main

DONE, STEPS = 2, 4
EPOCHS = {"num_train_epochs": 2, "save_steps": 1, "lr_scheduler_type": "constant"}
"""Two epochs of two steps, with all checkpoints."""
BASE: dict[str, Any] = {"learning_rate": 1e-3, "max_steps": STEPS, "optim": "adamw_torch"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[..., Path]:
    """Return a function that trains four steps (two per epoch) with some settings, once: the folder of the run."""
    folder = tmp_path_factory.mktemp("trained")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
        for number in range(8):
            turns = [("user", f"cloud {number}"), ("assistant", "seven " * (2 + number))]
            lines.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")

    def begin(adapter: dict[str, Any] | None = None, **settings: Any) -> Path:
        run = folder / str(abs(hash(json.dumps([adapter, settings], sort_keys=True))))
        if not run.exists():
            recipe: dict[str, Any] = {
                "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
                "chat": {"template": "chatml"},
                "data": {
                    **{"sources": [{"path": str(folder / "rows.jsonl")}], "max_length": 128, "packing": False},
                    **({"validation": 0.25} if "eval_strategy" in settings else {}),
                },
                "adapter": adapter,
                "training": {
                    **{"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 2},
                    **{"gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "steps"},
                    **{"save_steps": DONE, **BASE, **settings},
                    **({"max_steps": ...} if "num_train_epochs" in settings else {}),
                },
                "output_dir": str(run),
            }
            recipe["training"] = {key: value for key, value in recipe["training"].items() if value is not ...}
            path = folder / f"{run.name}.yaml"
            path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
            assert main(["--recipe", str(path)]) == 0
        return run

    return begin


@pytest.fixture
def resume(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that resumes a run from checkpoint 2 in another folder, with changes that --resume-anyway names."""

    def start(run: Path, *keys: str, code: int = 0, step: int = DONE, **changes: Any) -> Path:
        into = tmp_path / "run"
        shutil.copytree(run / f"checkpoint-{step}", into / f"checkpoint-{step}")
        arguments = ["--recipe", str(run.with_suffix(".yaml")), f"output_dir={into}"]
        for key, value in changes.items():
            key = key.replace("__", ".")
            arguments += ["--resume-anyway", key, f"{key}={json.dumps(value)}"]
        for key in keys:
            arguments += ["--resume-anyway", key]
        assert main(arguments) == code
        return into

    return start


def rates(run: Path) -> dict[int, float]:
    """Return the learning rate of each step in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}


def optimizer(run: Path, step: int) -> dict[str, Any]:
    return torch.load(run / f"checkpoint-{step}" / "optimizer.pt", weights_only=True)


def settings_of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in group.items() if key != "params"} for group in groups]


def by_hand(settings: Mapping[str, Any], folder: Path, steps: int) -> tuple[list[float], list[dict[str, Any]]]:
    """Return the learning rates of all steps of a run with these settings, and its parameter groups at the end."""
    arguments = SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, **settings)
    make, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    decays = (arguments.weight_decay, 0.0)
    optimizer_by_hand = make(
        [{"params": [weight], "weight_decay": decay} for weight, decay in zip(weights, decays, strict=True)], **options
    )
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer_by_hand,
        arguments.get_warmup_steps(steps),
        steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    learning_rates = []
    for _ in range(steps):
        learning_rates.append(optimizer_by_hand.param_groups[0]["lr"])
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer_by_hand.step()
        schedule.step()
    return learning_rates, settings_of(optimizer_by_hand.param_groups)


CHANGES: dict[str, dict[str, Any]] = {
    "learning-rate": {"learning_rate": 1e-4},
    "groups": {"weight_decay": 0.5, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-6},
    "length": {"max_steps": 6},
    "cosine-with-restarts": {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "warmup-stable-decay": {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 1}},
    "warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 4},
    "fused": {"optim": "adamw_torch_fused", "learning_rate": 2e-3},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_setting_is_in_force_from_the_first_step(
    name: str,
    trained: Callable[..., Path],
    resume: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes = CHANGES[name]
    run = resume(trained(), **{f"training__{key}": value for key, value in changes.items()})
    steps = changes.get("max_steps", STEPS)
    expected, groups = by_hand({**BASE, **changes}, tmp_path, steps)
    assert [rates(run)[step] for step in range(DONE + 1, steps + 1)] == pytest.approx(expected[DONE:], abs=1e-12)
    saved = optimizer(run, steps)
    assert settings_of(saved["param_groups"]) == groups
    assert {float(state["step"]) for state in saved["state"].values()} == {steps}  # the states went on
    key, value = next(iter(changes.items()))
    output = next(
        line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since checkpoint-2:")
    )
    assert f"training.{key} " in output
    assert f" -> {json.dumps(value)}" in output
    assert output.endswith("(in force from step 3)")
    written = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["training"]
    assert {key: written[key] for key in changes} == changes


def test_an_unchanged_recipe_resumes_bit_identically(trained: Callable[..., Path], resume: Callable[..., Path]) -> None:
    base_run = trained()
    run = resume(base_run)
    assert rates(run)[4] == rates(base_run)[4]
    before, after = optimizer(base_run, STEPS), optimizer(run, STEPS)
    assert before["param_groups"] == after["param_groups"]
    assert all(
        torch.equal(value, after["state"][number][key])
        for number, state in before["state"].items()
        for key, value in state.items()
    )


OTHERS = {
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "rmsprop": {"optim": "rmsprop"},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_optimizer_starts_with_fresh_states_and_a_message(
    name: str, trained: Callable[..., Path], resume: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = OTHERS[name]
    run = resume(trained(), **{f"training__{key}": value for key, value in changes.items()})
    output = capsys.readouterr().out
    message = f"the optimizer starts with fresh states after step 2: {changes['optim']} can't load those of adamw_torch"
    assert output.count(message) == 1
    assert rates(run) == pytest.approx({1: 1e-3, 2: 7.5e-4, 3: 5e-4, 4: 2.5e-4})
    assert not any("exp_avg" in state and "exp_avg_sq" in state for state in optimizer(run, 4)["state"].values())


def test_deepspeed_refuses_another_optimizer(trained: Callable[..., Path]) -> None:
    run = trained()
    checkpoint = read_checkpoint(run / "checkpoint-2")
    recipe = load_recipe(run.with_suffix(".yaml"), ["training.optim=adafactor"])
    settings = ResumedSettings(checkpoint, recipe)
    settings.refuse_under_deepspeed(checkpoint)
    under_deepspeed = replace(checkpoint, manifest={**checkpoint.manifest, "distribution": "DeepSpeed ZeRO-3"})
    with pytest.raises(UserError, match=r"holds the optimizer adamw_torch, and this run has adafactor\. DeepSpeed"):
        settings.refuse_under_deepspeed(under_deepspeed)


def test_a_changed_switch_of_an_optimizer_needs_fresh_states_and_a_changed_number_does_not(
    trained: Callable[..., Path], resume: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sgd = trained(optim="sgd", optim_args="momentum=0.9")
    run = resume(sgd, training__optim_args="momentum=0.5")
    assert "fresh states" not in capsys.readouterr().out
    assert {group["momentum"] for group in optimizer(run, 4)["param_groups"]} == {0.5}
    shutil.rmtree(run)
    resume(sgd, training__optim_args="momentum=0.9,nesterov=true")
    assert "fresh states" in capsys.readouterr().out


def test_a_schedule_that_follows_a_metric_keeps_its_reductions(
    trained: Callable[..., Path], resume: Callable[..., Path]
) -> None:
    """With patience 0 and a threshold that no loss reaches, each evaluation after the first halves the rate."""
    kwargs = {"factor": 0.5, "patience": 0, "threshold": 10.0, "threshold_mode": "abs"}
    by_metric = {
        **{"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": kwargs, "metric_for_best_model": "loss"},
        **{"eval_strategy": "steps", "eval_steps": 1},
    }
    base_run = trained(**by_metric)
    assert rates(base_run) == pytest.approx({1: 1e-3, 2: 1e-3, 3: 5e-4, 4: 2.5e-4})
    run = resume(base_run, training__learning_rate=1e-4, training__lr_scheduler_kwargs={**kwargs, "factor": 0.1})
    assert rates(run) == pytest.approx({1: 1e-3, 2: 1e-3, 3: 5e-5, 4: 5e-6})
    shutil.rmtree(run)
    run = resume(base_run, training__lr_scheduler_type="constant", training__lr_scheduler_kwargs=None)
    assert rates(run) == pytest.approx({1: 1e-3, 2: 1e-3, 3: 1e-3, 4: 1e-3})


def tokens(run: Path) -> int:
    """Return the tokens trained since the run began."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(json.loads(line).get("num_tokens", 0) for line in lines)


@pytest.mark.parametrize(("accumulation", "last"), [(1, 6), (4, 3)])
def test_a_changed_batch_size_continues_at_the_same_place_in_the_data(
    accumulation: int, last: int, trained: Callable[..., Path], resume: Callable[..., Path]
) -> None:
    """In the second of two epochs each row is trained once, in as many steps as it needs now."""
    base_run = trained(**EPOCHS)
    run = resume(base_run, training__gradient_accumulation_steps=accumulation)
    assert max(rates(run)) == last
    assert tokens(run) == tokens(base_run)
    manifest = json.loads((run / f"checkpoint-{last}" / "COMPLETE.json").read_text(encoding="utf-8"))
    assert (manifest["sequences"], manifest["epoch"]) == (16, 2.0)


def test_a_larger_batch_inside_an_epoch_reports_repeated_sequences(
    trained: Callable[..., Path], resume: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base_run = trained(**EPOCHS)
    run = resume(base_run, step=1, training__gradient_accumulation_steps=4)
    assert "checkpoint-1 lies inside a step of 8 sequences: its first 4 sequences are trained a second time" in (
        capsys.readouterr().out
    )
    assert max(rates(run)) == 3  # one that was, one for each epoch
    shutil.rmtree(run / "checkpoint-3")  # a second resume finds its place, too
    assert (
        main(
            [
                "--recipe",
                str(base_run.with_suffix(".yaml")),
                f"output_dir={run}",
                "training.gradient_accumulation_steps=4",
            ]
        )
        == 0
    )
    assert max(rates(run)) == 3


def test_more_epochs_train_the_same_as_a_longer_run(trained: Callable[..., Path], resume: Callable[..., Path]) -> None:
    longer = trained(**EPOCHS)
    run = resume(trained(**{**EPOCHS, "num_train_epochs": 1}), training__num_train_epochs=2)
    states_of_longer, states_of_resumed = (
        torch.load(path / "checkpoint-4" / "optimizer.pt", weights_only=True) for path in (longer, run)
    )
    assert all(
        torch.equal(value, states_of_resumed["state"][number][key])
        for number, state in states_of_longer["state"].items()
        for key, value in state.items()
    )


def test_a_run_beyond_its_new_end_reports_it(
    trained: Callable[..., Path], resume: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = resume(trained(), training__max_steps=1)
    output = capsys.readouterr().out
    assert "nothing is trained: this recipe ends at step 1, and checkpoint-2 has done 2 already" in output
    assert (run / "model.safetensors").read_bytes() == (run / "checkpoint-2" / "model.safetensors").read_bytes()


def test_changed_save_and_logging_steps_are_in_force(trained: Callable[..., Path], resume: Callable[..., Path]) -> None:
    run = resume(trained(), training__save_steps=1, training__logging_steps=2, training__max_steps=5)
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 3, 4, 5)}
    assert [step for step in rates(run) if step > DONE] == [4]


def test_an_adapter_may_change_its_scale_and_not_its_shape(
    trained: Callable[..., Path], resume: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base_run = trained(adapter={"r": 4, "target_modules": ["q_proj", "v_proj"]})
    run = resume(base_run, adapter__lora_alpha=4, adapter__lora_dropout=0.1, training__weight_decay=0.5)
    saved = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    assert (saved["lora_alpha"], saved["lora_dropout"]) == (4, 0.1)
    assert optimizer(run, 4)["param_groups"][0]["weight_decay"] == 0.5
    for change in {"adapter__r": 8}, {"adapter__target_modules": ["q_proj"]}, {"adapter__use_dora": True}:
        shutil.rmtree(run)
        capsys.readouterr()
        resume(base_run, code=2, training__optim="sgd", **change)
        key = next(iter(change)).replace("__", ".")
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert f"can't be loaded into this run: {key} decides which weights are trained" in error
