"""Arguments of learning rate schedulers and optimizers that transformers would refuse or ignore are errors of the recipe."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import optimization, trainer_optimizer
from transformers.training_args import OptimizerNames

from train.errors import UserError
from train.loop.optimizer_test import check_optimizer
from train.recipe import load_recipe
from train.recipe.lr_schedules import ARGUMENTS, FOLLOWS_EVALUATION, decay_error
from train.recipe.optimizer_arguments import allowed_arguments, missing_package
from train.recipe.schedule import compute_schedule, schedule_warnings
from train.recipe.sft_config import with_defaults

RECIPE = """\
model: {name_or_path: some/model}
data: {sources: [{path: rows.jsonl}], max_length: 64, validation: 0.5}
output_dir: out
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def read(**training: Any) -> Any:
        import json

        file = tmp_path / "recipe.yaml"
        file.write_text(RECIPE + f"training: {json.dumps(training)}\n")
        return load_recipe(file)

    return read


@pytest.fixture
def refusal(load: Callable[..., Any]) -> Callable[..., str]:
    def read(**training: Any) -> str:
        with pytest.raises(UserError) as caught:
            load(**training)
        return str(caught.value).partition(": ")[2]

    return read


@pytest.mark.parametrize("name", ARGUMENTS)
def test_scheduler_arguments_are_those_of_transformers_and_torch(name: str) -> None:
    function: Any = optimization.TYPE_TO_SCHEDULER_FUNCTION[optimization.SchedulerType(name)]
    if name in FOLLOWS_EVALUATION:
        function = optimization.GreedyLR if name == "greedy" else torch.optim.lr_scheduler.ReduceLROnPlateau
    never = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    assert set(ARGUMENTS[name]) == set(inspect.signature(function).parameters) - never


def test_every_scheduler_is_listed() -> None:
    assert set(ARGUMENTS) == {kind.value for kind in optimization.SchedulerType}


@pytest.mark.parametrize("optimizer", OptimizerNames)
def test_optimizer_arguments_are_those_that_transformers_reads(optimizer: OptimizerNames) -> None:
    source = inspect.getsource(trainer_optimizer._OPTIMIZER_HANDLERS[optimizer])
    if optimizer.value.startswith("rmsprop_") or (
        "AdEMAMix" in source and "ademamix" not in optimizer.value
    ):  # all are passed on as text
        source = ""
    read = set(re.findall(r"optim_args(?:\.get\(|\.pop\(|\[)\"(\w+)\"|\"(\w+)\" in ctx\.optim_args", source))
    for names in re.findall(r"for key in \((.*?)\):\n\s+if key in ctx\.optim_args", source):
        read |= {(name, "") for name in re.findall(r"\"(\w+)\"", names)}
    assert set(allowed_arguments(optimizer.value)) == {a or b for a, b in read} - {"block_size"}  # passed on as text


REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no required argument": (
        {"lr_scheduler_type": "cosine_with_min_lr"},
        ["training.lr_scheduler_kwargs: `training.lr_scheduler_type: cosine_with_min_lr` needs min_lr or min_lr_rate",
         "Write `training.lr_scheduler_kwargs: {min_lr_rate: 0.1}`"],
    ),
    "no length of the decay": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"min_lr_ratio": 0.1}},
        ["needs num_decay_steps. Write `training.lr_scheduler_kwargs: {num_decay_steps: N}`"],
    ),
    "two exclusive arguments": (
        {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0.1}},
        ["min_lr and min_lr_rate are both given"],
    ),
    "a misspelt argument": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycle": 2}},
        ["training.lr_scheduler_kwargs.num_cycle", "no argument 'num_cycle'", "Did you mean `num_cycles`?"],
    ),
    "an argument of another scheduler": (
        {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": {"num_cycles": 2}},
        ["no argument 'num_cycles'. Allowed: none, remove the section"],
    ),
    "text instead of a number": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": "two"}},
        ["num_cycles: found 'two'. Allowed: a number > 0"],
    ),
    "a share instead of an integer": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 0.1}},
        ["num_decay_steps: found 0.1. Allowed: an integer >= 1"],
    ),
    "an unknown curve": (
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 9, "decay_type": "exp"}},
        ["decay_type: found 'exp'. Allowed: linear, cosine, 1-sqrt"],
    ),
    "invalid JSON": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": "num_cycles=2"},
        ["found 'num_cycles=2'. Write a section"],
    ),
    "JSON with a misspelt argument": (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": '{"cycles": 2}'},
        ["no argument 'cycles'"],
    ),
    "an end above the start": (
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-5, "lr_scheduler_kwargs": {"lr_end": 1e-4}},
        ["lr_end is 0.0001 (given), which is not below `training.learning_rate` (1e-05)"],
    ),
    "a default end above the start": (
        {"lr_scheduler_type": "polynomial", "learning_rate": 1e-8},
        ["lr_end is 1e-07 (polynomial's default)"],
    ),
    "a floor above the rate": (
        {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "learning_rate": 1e-5},
        ["min_lr is 0.001 (greedy's default)"],
    ),
    "no evaluation to follow": (
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        ["reduce_lr_on_plateau follows the evaluation loss"],
    ),
    "part of a step of warm-up": ({"warmup_steps": 1.5}, ["training.warmup_steps: found 1.5. Write an integer"]),
    "a negative rate": ({"learning_rate": -1e-5}, ["training.learning_rate: found -1e-05", ">= 0"]),
    "a decay of the momentum above 1": ({"adam_beta1": 1.5}, ["training.adam_beta1: found 1.5", "< 1"]),
    "a negative epsilon": ({"adam_epsilon": -1e-8}, ["training.adam_epsilon: found -1e-08", "> 0"]),
    "an unused argument": ({"optim_args": "beta1=0.9"}, ["training.optim_args", "takes no arguments", "beta1"]),
    "a misspelt argument of the optimizer": (
        {"optim": "sgd", "optim_args": "momentun=0.9"},
        ["training.optim_args: sgd has no argument momentun", "Did you mean `momentum`?"],
    ),
    "an argument without a value": ({"optim": "sgd", "optim_args": "momentum"}, ["Write arguments as `name=value"]),
    "text for an optimizer's number": (
        {"optim": "ademamix", "optim_args": "alpha=5.0,t_alpha=1.5"},
        ["found 't_alpha=1.5'. t_alpha must be an integer"],
    ),
    "arguments passed to bitsandbytes as text": (
        {"optim": "rmsprop_bnb", "optim_args": "alpha=0.9"},
        ["rmsprop_bnb takes no arguments"],
    ),
    "false, which is read as true": (
        {"optim": "stable_adamw", "optim_args": "kahan_sum=false"},
        ["kahan_sum must be true, or removed"],
    ),
    "no modules to project": ({"optim": "apollo_adamw"}, ["training.optim_target_modules: required by apollo_adamw"]),
    "modules that nothing projects": (
        {"optim": "adafactor", "optim_target_modules": ["q_proj"]},
        ["training.optim_target_modules: not used by adafactor"],
    ),
    "labels of another name": ({"label_names": ["foo"]}, ["training.label_names: not set here"]),
    "no step": ({"max_steps": 0}, ["training.max_steps: found 0", "a number >= 1, or -1"]),
    "fewer steps than none": ({"max_steps": -2}, ["training.max_steps: found -2", ">= -1"]),
    "no epoch": ({"num_train_epochs": 0}, ["training.num_train_epochs: found 0", "> 0"]),
    "a negative epoch": ({"num_train_epochs": -1}, ["training.num_train_epochs: found -1", "> 0"]),
    **{
        f"{key}: 0": ({key: 0}, [f"training.{key}: found 0. Allowed: a", words])
        for words, keys in {
            "> 0": ("save_steps", "eval_steps", "logging_steps"),
            ">= 1": (
                *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
                *("eval_accumulation_steps", "save_total_limit"),
            ),
        }.items()
        for key in keys
    },
    "batches of all processes": ({"accelerator_config": {"split_batches": True}}, ["split_batches is true"]),
    "batches of the first process": ({"accelerator_config": {"dispatch_batches": True}}, ["dispatch_batches is true"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_settings_are_errors_of_the_recipe(refusal: Callable[..., str], case: str) -> None:
    training, words = REFUSED[case]
    error = refusal(**training)
    assert error.startswith("training.")
    assert [word for word in words if word not in error] == []
    assert "\n" not in error


ALLOWED: list[dict[str, Any]] = [
    {},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6, "num_cycles": 1}},
    {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 5},
    {"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 3}', "warmup_steps": 0.1},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-9, "power": 2}},
    {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": None}},
    {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 10}, "max_steps": 20},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "lr_scheduler_kwargs": {"patience": 1}},
    {"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "lr_scheduler_kwargs": {"min_lr": 0}},
    {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=True"},
    {"optim": "adafactor"},
    {"optim": "rmsprop", "optim_args": "alpha=0.9,centered=true"},
    {"optim": "adagrad", "optim_args": "lr_decay=1e-3"},
    {"optim": "adamw_torch", "weight_decay": 0.1, "max_steps": -1},
    {"optim": "adamw_bnb_8bit"},
    {"optim": "paged_ademamix_8bit", "optim_args": "t_alpha=100,beta3=0.999"},
]


@pytest.mark.parametrize("training", ALLOWED)
def test_valid_settings_can_be_built(load: Callable[..., Any], training: dict[str, Any]) -> None:
    if missing_package(training.get("optim", "")):
        pytest.skip("an optional package is not installed")
    check_optimizer(load(**training))


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"optim": "sgd", "optim_args": "nesterov=true"}, ["training.optim: sgd can't be built with", "optim_args"]),
        ({"optim": "adagrad", "optim_args": "eps=-1"}, ["training.optim: adagrad can't be built with", "optim_args"]),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1.7e308}},
            ["training.lr_scheduler_kwargs: transformers can't build a cosine schedule", "Write other arguments"],
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch",
             "lr_scheduler_kwargs": {"min_lr": [0.0, 0.0, 0.0]}},
            ["training.lr_scheduler_kwargs: transformers can't build a reduce_lr_on_plateau schedule"],
        ),
    ],
)  # fmt: skip
def test_errors_found_by_building_name_their_key(
    load: Callable[..., Any], training: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        check_optimizer(load(**training))
    assert [word for word in words if word not in str(caught.value)] == []


def test_missing_packages_of_optimizers_are_errors() -> None:
    def installed(module: str) -> object:
        return None

    needed = {
        "adamw_bnb_8bit": "bitsandbytes",
        "paged_adamw_32bit": "bitsandbytes",
        "lion_8bit": "bitsandbytes",
        "adamw_torch_4bit": "torchao",
        "galore_adafactor_layerwise": "galore-torch",
        "apollo_adamw": "apollo-torch",
        "adalomo": "lomo-optim",
        "grokadamw": "grokadamw",
        "schedule_free_sgd": "schedulefree",
        "stable_adamw": "torch-optimi",
    }
    for optimizer, package in needed.items():
        assert missing_package(optimizer, installed) == package, optimizer
    built_in = {"", "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    assert {name for name in (*needed, *built_in) if not missing_package(name, installed)} == built_in
    optimizers = {name.value for name in OptimizerNames if trainer_optimizer._OPTIMIZER_HANDLERS[name]}
    from_packages = {name for name in optimizers if missing_package(name, installed)}
    sources = {
        name: inspect.getsource(trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames(name)]) for name in optimizers
    }
    # handlers with imports of their own need more than torch and transformers
    imports = {name for name, text in sources.items() if re.search(r"^\s+from (?!torch\.optim)", text, re.MULTILINE)}
    assert from_packages == imports


def test_a_decay_longer_than_the_run_is_an_error() -> None:
    training = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 8}}
    settings = with_defaults(training)
    assert decay_error(settings, 10, 2) is None
    assert "8 steps of decay and 3 of warm-up are more than the 10" in (decay_error(settings, 10, 3) or "")
    assert "Write 7 or less" in (decay_error(settings, 10, 3) or "")


WARNED: list[tuple[dict[str, Any], str | None]] = [
    ({}, None),
    ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "There is no warm-up: training.lr_scheduler_type: constant"),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5}, None),
    ({"warmup_steps": 10}, "All of 10 steps are warm-up"),
    ({"warmup_steps": 9}, None),
    ({"learning_rate": 0}, "Nothing is trained"),
    ({"save_steps": 11}, "No checkpoint is saved before the end: training.save_steps is 11, and the run has 10 steps"),
    ({"save_steps": 10}, None),
    ({"logging_steps": 11}, "No loss is logged before the end: training.logging_steps is 11"),
    ({"eval_strategy": "steps", "eval_steps": 11}, "Nothing is evaluated before the end: training.eval_steps is 11"),
    ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 11}, "Nothing is evaluated: training.eval_delay is 11"),
    ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 10}, None),  # step 10 is evaluated
    ({"eval_strategy": "epoch", "eval_delay": 0.5}, None),
    ({"per_device_train_batch_size": 41, "max_steps": 10}, "A step takes 41 sequences, and an epoch has 40"),
    ({"per_device_train_batch_size": 10, "gradient_accumulation_steps": 4, "max_steps": 10}, None),
]


@pytest.mark.parametrize(("training", "warning"), WARNED)
def test_settings_without_effect_are_warnings(training: dict[str, Any], warning: str | None) -> None:
    settings = {"per_device_train_batch_size": 4, "num_train_epochs": 1, **training}
    warnings = list(schedule_warnings(settings, compute_schedule(settings, 40, 1.0, 1), 40))
    assert [text[: len(warning or "")] for text in warnings] == ([warning] if warning else [])
