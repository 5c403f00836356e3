"""FSDP2 on two CPU ranks: losses, gradients, evaluation, the saved model and a resumed run are those of one process.

accelerate_configs/fsdp2.yaml as it is shipped, on gloo.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from ranks import launch
from safetensors.torch import load_file
from small_runs import read_metrics, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.errors import UserError
from train.loop.arguments import training_arguments
from train.recipe import load_recipe
from train.sft import main

STEPS = 4
SAVED_AT = 2
ROUNDING = 2e-6
"""Relative, of losses and norms in float32: sums of some 3,000 terms (6e-8 each), added up in another order."""
ROUNDING_OF_BF16 = 5e-3
"""Relative, of losses in bf16 against float32: a value is off by up to 2^-9 = 2e-3, and their mean by less."""


@dataclass(frozen=True)
class Setting:
    """A run of 4 sequences per step; two processes under FSDP2 train 2 micro-batches each."""

    processes: int = 2
    bf16: bool = False
    lora: bool = False
    resumed: bool = False

    @property
    def name(self) -> str:
        words = ["fsdp2" if self.processes > 1 else "alone", "lora" if self.lora else "full"]
        return "-".join([*words, *(["bf16"] if self.bf16 else []), *(["resumed"] if self.resumed else [])])


@dataclass(frozen=True)
class Trained:
    folder: Path
    metrics: list[dict[str, Any]]
    facts: list[dict[str, Any]]

    def values(self, name: str) -> list[float]:
        return [line[name] for line in self.metrics if name in line]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        adapter = self.folder / "adapter_model.safetensors"
        return load_file(adapter if adapter.exists() else self.folder / "model.safetensors")


@pytest.fixture(scope="module")
def untied_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny model with an output layer of its own."""
    folder = tmp_path_factory.mktemp("untied")
    tied = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = tied.config
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    untied = type(tied)(config)
    untied.load_state_dict({**tied.state_dict(), "lm_head.weight": untied.lm_head.weight.detach()})
    untied.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(
    tiny_model: Path, untied_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Setting], Trained]:
    """Return a function that trains a setting once."""
    root = tmp_path_factory.mktemp("runs")
    rows = write_rows(root / "rows.jsonl", 80, seed=11, system=20, user=10, answers=(1, 5, 40, 120))
    runs: dict[Setting, Trained] = {}

    def train(setting: Setting) -> Trained:
        if setting in runs:
            return runs[setting]
        folder = root / setting.name
        folder.mkdir()
        if setting.resumed:
            half = train(replace(setting, resumed=False)).folder / f"checkpoint-{SAVED_AT}"
            shutil.copytree(half, folder / "run" / half.name)
        recipe = write_recipe(
            folder / "recipe.yaml",
            untied_model if setting.lora else tiny_model,
            rows,
            folder / "run",
            data={"validation": 0.2},
            training={
                "bf16": setting.bf16,
                "gradient_checkpointing": True,
                "learning_rate": 2e-3,
                "adam_epsilon": 1e-3,  # tests/integration/test_sharded_training.py explains it
                "gradient_accumulation_steps": 4 // setting.processes,
                "max_steps": STEPS,
                "save_steps": SAVED_AT,
                "eval_strategy": "steps",
                "eval_steps": SAVED_AT,
            },
            adapter={"r": 4, "modules_to_save": ["lm_head"]} if setting.lora else None,
            system_gain={"rows": 8},
        )
        config = "fsdp2.yaml" if setting.processes > 1 else None
        outcome = launch(
            setting.processes,
            config,
            folder,
            "--recipe",
            recipe,
            f"model.dtype={'bfloat16' if setting.bf16 else 'float32'}",
            logs=folder / "logs",
            job=train_and_measure,
        ).succeeded()
        assert setting.resumed == ("resuming from" in outcome.output[0])
        metrics = read_metrics(folder / "run")
        facts = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(setting.processes)]
        runs[setting] = Trained(folder / "run", metrics, facts)
        return runs[setting]

    return train


def train_and_measure(folder: str, *arguments: str) -> int:
    """Run train/sft.py with `arguments`; write facts of gradients between micro-batches and of losses."""
    from torch.distributed.tensor import DTensor

    from train.loop import trainer
    from train.sft import main

    training_step, fused_loss = trainer.JanusTrainer.training_step, trainer.fused_loss
    facts: dict[str, Any] = {"gradients": [], "losses": []}

    def measured_step(self: trainer.JanusTrainer, *inputs: Any, **keywords: Any) -> torch.Tensor:
        loss = training_step(self, *inputs, **keywords)
        if not self.accelerator.sync_gradients:
            for name, weight in self.model.named_parameters():
                if weight.requires_grad:
                    gradient = weight.grad
                    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                    facts["gradients"].append(
                        {
                            "name": name,
                            "sharded": isinstance(gradient, DTensor),
                            "elements": weight.numel(),
                            "local": None if local is None else local.numel(),
                            "dtype": str(local.dtype) if local is not None else None,
                            "finer": is_finer_than_bf16(local) if local is not None else None,
                        }
                    )
        return loss

    def measured_loss(outputs: Any, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, losses = fused_loss(outputs, *rest)
        facts["losses"].append({"dtype": str(losses.dtype), "finer": is_finer_than_bf16(losses)})
        return loss, losses

    trainer.JanusTrainer.training_step, trainer.fused_loss = measured_step, measured_loss
    code = main(list(arguments))
    Path(folder, f"{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))
    return code


def is_finer_than_bf16(values: torch.Tensor) -> bool:
    return bool((values != values.bfloat16().to(values.dtype)).any())


KINDS = pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])


@KINDS
def test_two_ranks_train_and_evaluate_as_one_process(lora: bool, trained: Callable[[Setting], Trained]) -> None:
    """In float32. The adapter trains the output layer too, which TRL's fused head reads and does not call."""
    sharded, alone = trained(Setting(lora=lora)), trained(Setting(1, lora=lora))
    assert len(alone.values("loss")) == STEPS
    assert len(alone.values("eval_loss")) == STEPS // SAVED_AT
    for name in "loss", "grad_norm", "eval_loss", "eval_entropy":
        assert sharded.values(name) == pytest.approx(alone.values(name), rel=ROUNDING), name
    for name in "eval_system_gain", "eval_system_gain_over_none":
        assert sharded.values(name) == pytest.approx(alone.values(name), abs=1e-5), name
    assert sharded.weights.keys() == alone.weights.keys()
    for name, weight in alone.weights.items():
        torch.testing.assert_close(sharded.weights[name], weight, rtol=0, atol=1e-6)


@KINDS
def test_bf16_is_close_to_float32(lora: bool, trained: Callable[[Setting], Trained]) -> None:
    sharded, exact = trained(Setting(bf16=True, lora=lora)), trained(Setting(1, lora=lora))
    for name in "loss", "eval_loss":
        assert sharded.values(name) == pytest.approx(exact.values(name), rel=ROUNDING_OF_BF16), name
        assert sharded.values(name) != pytest.approx(exact.values(name), rel=ROUNDING)
    assert sharded.values("grad_norm") == pytest.approx(exact.values("grad_norm"), rel=0.03)


@KINDS
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_gradients_stay_sharded_between_micro_batches_and_are_reduced_in_float32(
    lora: bool, bf16: bool, trained: Callable[[Setting], Trained]
) -> None:
    """Means of two ranks' bf16 gradients that were computed in bf16 would have its 8 bits."""
    run = trained(Setting(bf16=bf16, lora=lora))
    for facts in run.facts:
        gradients = facts["gradients"]
        assert len(gradients) == STEPS * len({gradient["name"] for gradient in gradients})
        assert all(gradient["sharded"] for gradient in gradients)
        assert {gradient["dtype"] for gradient in gradients} == {"torch.float32"}
        assert all(gradient["finer"] for gradient in gradients if gradient["elements"] > 64 and not lora)
        assert any(gradient["finer"] for gradient in gradients)
    locals_of_ranks = [[gradient["local"] for gradient in facts["gradients"]] for facts in run.facts]
    sizes = [gradient["elements"] for gradient in run.facts[0]["gradients"]]
    assert [sum(parts) for parts in zip(*locals_of_ranks, strict=True)] == sizes
    assert max(map(sum, locals_of_ranks)) <= 0.51 * sum(sizes)


@KINDS
def test_losses_of_tokens_are_not_rounded_to_bf16(lora: bool, trained: Callable[[Setting], Trained]) -> None:
    for facts in trained(Setting(bf16=True, lora=lora)).facts:
        assert len(facts["losses"]) >= 2 * STEPS
        assert all(losses == {"dtype": "torch.float32", "finer": True} for losses in facts["losses"])


@KINDS
def test_a_resumed_run_ends_like_an_uninterrupted_one(lora: bool, trained: Callable[[Setting], Trained]) -> None:
    setting = Setting(bf16=True, lora=lora)
    whole, resumed = trained(setting), trained(replace(setting, resumed=True))
    assert len(resumed.values("loss")) == STEPS
    for name in "loss", "grad_norm", "eval_loss", "eval_system_gain":
        assert resumed.values(name) == whole.values(name), name
    assert resumed.weights.keys() == whole.weights.keys()
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


@KINDS
def test_the_saved_model_loads_in_plain_transformers(
    lora: bool, trained: Callable[[Setting], Trained], untied_model: Path
) -> None:
    ids = torch.randint(0, 290, (2, 50), generator=torch.Generator().manual_seed(3))
    logits = []
    for run in trained(Setting(lora=lora)), trained(Setting(1, lora=lora)):
        if lora:
            base = AutoModelForCausalLM.from_pretrained(untied_model, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, run.folder)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(run.folder, output_loading_info=True)
            assert not any(info.values())
            assert model.dtype == torch.float32
        logits.append(model(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=1e-4)


@pytest.fixture
def launched_by_fsdp2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")


@pytest.mark.usefixtures("launched_by_fsdp2")
@pytest.mark.parametrize("copied", ["lm_head", "embed_tokens"])
def test_a_trained_copy_of_a_tied_layer_is_refused(
    copied: str, tiny_model: Path, untied_model: Path, recipe_file: Callable[..., Path]
) -> None:
    """accelerate would tie the copy to the layer that it was copied from."""
    adapter = {"r": 2, "modules_to_save": [copied]}
    with pytest.raises(UserError, match=f"adapter.modules_to_save: {copied} shares its weight with another layer"):
        training_arguments(load_recipe(recipe_file(adapter=adapter)))
    training_arguments(load_recipe(recipe_file(adapter=adapter, model={"name_or_path": str(untied_model)})))
    training_arguments(load_recipe(recipe_file(adapter={"r": 2, "modules_to_save": ["norm"]})))


@pytest.mark.usefixtures("launched_by_fsdp2")
def test_a_run_that_accelerate_does_not_shard_is_refused(
    recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """It ignores FSDP on a CPU, and each process would have all weights."""
    assert main(["--recipe", str(recipe_file(training={"max_steps": 1, "num_train_epochs": ...}))]) == 2
    assert "error: FSDP: accelerate shards on GPUs only" in capsys.readouterr().err


@pytest.mark.usefixtures("launched_by_fsdp2")
def test_the_recipe_may_turn_off_the_reduction_after_each_micro_batch(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(**training: Any) -> dict[str, Any]:
        arguments = training_arguments(load_recipe(recipe_file(training=training)))
        return {
            "accumulation": arguments.accelerator_config.gradient_accumulation_kwargs,
            "plugin": arguments.fsdp_plugin_args,
        }

    assert settings()["accumulation"] == {"sync_each_batch": True}
    chosen = {"gradient_accumulation_kwargs": {"sync_each_batch": False}}
    assert settings(accelerator_config=chosen)["accumulation"] == {"sync_each_batch": False}
    policy = settings(bf16=True)["plugin"]["mixed_precision_policy"]
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert settings() == {"accumulation": None, "plugin": None}
