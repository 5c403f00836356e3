"""Distributed training: the same 64 rows over processes, accumulation steps and ZeRO's stages give the same model.

In float32 on CPU processes, with the shipped configurations.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ranks import launch
from safetensors.torch import load_file
from small_runs import read_metrics, write_recipe, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("deepspeed")

STEPS = 5
SAVED_AT = 3
NOISE_OF_LOSS = 2e-6
"""Relative. A loss is a sum of some 3,000 float32 terms (rounding 6e-8 each), added up in another order by each
setting; errors of such sums grow with the root of their number: 6e-8 x 55 = 3e-6, and the mean of them over steps less."""
LEARNING_RATE, EPSILON = 2e-3, 1e-3
"""Adam moves a weight by learning rate x mean gradient / (root of mean square + epsilon). Where a gradient is smaller
than epsilon, an error d of it is one of learning rate x d / epsilon of the weight. Under ZeRO-3 there are such errors:
the forward pass and the gradients down to the first RMSNorm have the bits of one process, but there three gradients
meet (of the residual, of the square and of the product), and DeepSpeed's hooks have autograd add them up in another
order, so all below differ by a rounding. With an epsilon of 1e-6 some weights were off by 2e-4 to 1e-3 of the largest
change; with 1e-4 and 1e-2, and with plain SGD, by no more than weights themselves round. So epsilon here is of the size
of a usual gradient: a norm of 1 over 95,000 weights is 3e-3 each."""
ROUNDING = 2**-24
"""Of float32, relative. A gradient's error is taken as this much of the norm, which clipping holds at 1."""


def noise_of_weights(weight: torch.Tensor) -> torch.Tensor:
    """Return the largest expected difference of each element of a weight.

    Through the gradient: an error counts in Adam's numerator and in its denominator, and the rates of all steps add up
    (linear to 0). And in each step each run rounds the weight. Together at most 2.5e-4 of a tensor's largest change;
    what is wrong in kind (a mean over ranks in place of tokens, a rank's rows twice) moves weights by tens of percent.
    """
    rates = sum(LEARNING_RATE * (1 - step / STEPS) for step in range(STEPS))
    return rates * 2 * ROUNDING / EPSILON + STEPS * 2 * ROUNDING * weight.abs()


@dataclass(frozen=True)
class Setting:
    """Distribution of 8 sequences per step."""

    processes: int = 1
    config: str | None = None
    packed: bool = True
    lora: bool = False
    accumulation: int | None = None

    @property
    def name(self) -> str:
        kind = Path(self.config or ("ddp" if self.processes > 1 else "alone")).stem
        return f"{kind}-{self.processes}-{'packed' if self.packed else 'rows'}-{'lora' if self.lora else 'full'}-{self.accumulation or 8}"


@dataclass(frozen=True)
class Trained:
    folder: Path
    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path, *, lora: bool) -> "Trained":
        """Return the steps of a finished run, and its weights or adapter."""
        steps = [line for line in read_metrics(folder) if "loss" in line]
        weights = load_file(folder / ("adapter_model.safetensors" if lora else "model.safetensors"))
        return cls(folder, [line["loss"] for line in steps], [line["grad_norm"] for line in steps], weights)


@pytest.fixture(scope="module")
def rows_64(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return write_rows(path, 64, seed=11, system=20, user=10, answers=(1, 5, 40, 120))


@pytest.fixture(scope="module")
def trained(rows_64: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """Return a function that trains a setting once; with `resumed` from a checkpoint half-way, in another folder."""
    root = tmp_path_factory.mktemp("runs")
    runs: dict[tuple[Setting, bool], Trained] = {}

    def recipe(setting: Setting, folder: Path) -> Path:
        training = {
            "gradient_checkpointing": True,
            "learning_rate": LEARNING_RATE,
            "adam_epsilon": EPSILON,
            "lr_scheduler_type": "linear",
            "gradient_accumulation_steps": setting.accumulation or 8 // setting.processes,
            "max_steps": STEPS,
            "save_steps": SAVED_AT,
        }
        adapter = {"r": 4, "modules_to_save": ["lm_head"]} if setting.lora else None
        path, data = root / f"{folder.name}.yaml", {"packing": setting.packed}
        return write_recipe(path, tiny_model, rows_64, folder, data=data, training=training, adapter=adapter)

    def train(setting: Setting, *, resumed: bool = False) -> Trained:
        if (setting, resumed) not in runs:
            folder = root / (setting.name + ("-resumed" if resumed else ""))
            if resumed:
                train(setting)
                shutil.copytree(root / setting.name / f"checkpoint-{SAVED_AT}", folder / f"checkpoint-{SAVED_AT}")
            outcome = launch(
                setting.processes,
                setting.config,
                "--recipe",
                recipe(setting, folder),
                logs=root / f"{folder.name}-logs",
            ).succeeded()
            assert "Warning" not in "".join(outcome.output)
            assert resumed == ("resuming from" in outcome.output[0])
            runs[setting, resumed] = Trained.read(folder, lora=setting.lora)
        return runs[setting, resumed]

    return train


def compare(got: Trained, expected: Trained) -> tuple[float, float, float]:
    """Return the largest differences: relative of losses and gradient norms, and of weights in units of their noise."""
    relative = lambda ours, theirs: max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))  # noqa: E731
    assert got.weights.keys() == expected.weights.keys()
    weights = [
        ((got.weights[name] - weight).abs() / noise_of_weights(weight)).max()
        for name, weight in expected.weights.items()
    ]
    return relative(got.losses, expected.losses), relative(got.norms, expected.norms), max(weights).item()


SPREAD = [
    Setting(*where, packed=packed, lora=lora)
    for where in ((2, None), (2, "zero3.yaml"), (4, "zero3.yaml"))
    for packed in (True, False)
    for lora in (False, True)
] + [  # stages 1 and 2 with each number of processes, each kind of training, packed
    Setting(2, "zero1.yaml"),
    Setting(4, "zero1.yaml", lora=True),
    Setting(2, "zero2.yaml", lora=True),
    Setting(4, "zero2.yaml"),
]


@pytest.mark.parametrize("setting", SPREAD, ids=lambda setting: setting.name)
def test_losses_and_weights_are_those_of_one_process(setting: Setting, trained: Callable[..., Trained]) -> None:
    expected = trained(replace(setting, processes=1, config=None))
    assert len(expected.losses) == STEPS
    assert expected.losses[0] - expected.losses[-1] > 0.15
    loss, norm, weights = compare(trained(setting), expected)
    assert loss < NOISE_OF_LOSS
    assert norm < NOISE_OF_LOSS
    assert weights < 1


def test_the_comparison_detects_one_missing_sequence_of_eight(trained: Callable[..., Trained]) -> None:
    """With seven sequences per step instead of eight, all three differences are far above the noise."""
    loss, norm, weights = compare(trained(Setting(accumulation=7)), trained(Setting()))
    assert loss > 100 * NOISE_OF_LOSS
    assert norm > 100 * NOISE_OF_LOSS
    assert weights > 100


RESUMED = [
    Setting(2, "zero1.yaml"),
    Setting(4, "zero1.yaml", lora=True),
    Setting(2, "zero2.yaml", lora=True),
    Setting(4, "zero2.yaml"),
    Setting(2, "zero3.yaml"),
    Setting(2, "zero3.yaml", lora=True),
    Setting(4, "zero3.yaml", lora=True),
]


@pytest.mark.parametrize("setting", RESUMED, ids=lambda setting: setting.name)
def test_a_resumed_run_ends_like_an_uninterrupted_one(setting: Setting, trained: Callable[..., Trained]) -> None:
    whole, resumed = trained(setting), trained(setting, resumed=True)
    assert len(resumed.losses) == STEPS  # those before it are told by the checkpoint
    assert resumed.losses == pytest.approx(whole.losses, rel=NOISE_OF_LOSS)
    for name, weight in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weight, rtol=0, atol=1e-6)


def test_changed_settings_are_in_force_from_the_first_step(trained: Callable[..., Trained], tmp_path: Path) -> None:
    """DeepSpeed loads them with the states, too."""
    whole = trained(RESUMED[0]).folder
    shutil.copytree(whole / f"checkpoint-{SAVED_AT}", tmp_path / "run" / f"checkpoint-{SAVED_AT}")
    changes = {"learning_rate": 1e-4, "weight_decay": 0.5, "adam_beta1": 0.8, "max_grad_norm": 0.5, "max_steps": 6}
    names = [
        word
        for key, value in changes.items()
        for word in ("--resume-anyway", f"training.{key}", f"training.{key}={value}")
    ]
    recipe = whole.with_suffix(".yaml")
    launch(2, "zero1.yaml", "--recipe", recipe, f"output_dir={tmp_path / 'run'}", *names, logs=tmp_path).succeeded()
    lines = read_metrics(tmp_path / "run")
    rates = {line["step"]: line["learning_rate"] for line in lines if "loss" in line}
    assert [rates[step] for step in (4, 5, 6)] == pytest.approx([1e-4 * left / 6 for left in (3, 2, 1)])
    states = next((tmp_path / "run" / "checkpoint-6").glob("global_step*/*optim_states.pt"))
    saved = torch.load(states, weights_only=False)["optimizer_state_dict"]
    groups = saved["base_optimizer_state"]["param_groups"]
    assert [(group["weight_decay"], group["betas"]) for group in groups] == [(0.5, (0.8, 0.999)), (0.0, (0.8, 0.999))]
    assert saved["clip_grad"] == 0.5


@pytest.mark.parametrize("setting", RESUMED, ids=lambda setting: setting.name)
def test_the_saved_model_loads_in_plain_transformers_with_the_same_logits(
    setting: Setting, trained: Callable[..., Trained], tiny_model: Path
) -> None:
    """The reference is one process that trained the same in full precision."""
    run, alone = trained(setting), trained(replace(setting, processes=1, config=None))
    ids = torch.randint(0, 290, (2, 50), generator=torch.Generator().manual_seed(3))
    logits = []
    for folder in (run.folder, alone.folder):
        if setting.lora:
            base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, folder)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not any(info.values())
        logits.append(model(ids).logits)
    untrained = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(ids).logits
    assert (logits[0] - untrained).abs().max() > 0.5
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-3)
    AutoTokenizer.from_pretrained(run.folder)


def measure_loading(recipe: str, report: str) -> None:
    """Load a model as train/sft.py does, and write what this rank holds of it."""
    from train.loop.arguments import training_arguments
    from train.model.load import load_model
    from train.recipe import load_recipe

    loaded = load_recipe(recipe)
    arguments = training_arguments(loaded)
    model = load_model(loaded)
    held = {name: getattr(value, "ds_tensor", value).numel() for name, value in model.named_parameters()}
    Path(f"{report}-{arguments.process_index}.json").write_text(
        json.dumps({"held": held, "beside": sum(value.numel() for value in model.parameters())})
    )


def test_no_rank_holds_the_complete_model_after_loading(
    recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    report = tmp_path / "held"
    launch(2, "zero3.yaml", recipe_file(), report, job=measure_loading, logs=tmp_path / "logs").succeeded()
    whole = {name: value.numel() for name, value in load_file(tiny_model / "model.safetensors").items()}
    for rank in (0, 1):
        sizes = json.loads(Path(f"{report}-{rank}.json").read_text())
        assert sizes["beside"] == 0  # nothing gathered is left
        assert sizes["held"] == {name: -(-count // 2) for name, count in whole.items()}


def test_qlora_under_zero3(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """4-bit weights are partitioned, the adapter is trained and saved completely, and an unsuitable storage is refused."""
    pytest.importorskip("bitsandbytes")
    quantization = {"bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "float32"}
    recipe = recipe_file(
        adapter={"r": 4},
        quantization=quantization,
        training={"per_device_train_batch_size": 1, "num_train_epochs": ..., "max_steps": 2},
    )
    launch(2, "zero3.yaml", "--recipe", recipe, logs=tmp_path / "logs").succeeded()
    adapter = load_file(tmp_path / "run" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 2
    assert all(value.abs().max() > 0 for value in adapter.values())  # lora_B starts as zeros
    wrong = launch(
        2, "zero3.yaml", "--recipe", recipe, "quantization.bnb_4bit_quant_storage=uint8", "--resume", "never",
        logs=tmp_path / "logs",
    )  # fmt: skip
    assert wrong.exit_codes == [2, 2]
    assert "error: quantization.bnb_4bit_quant_storage: uint8 differs from model.dtype: float32" in wrong.output[0]


@pytest.mark.parametrize("config", ["zero1.yaml", "zero2.yaml", "zero3.yaml"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_bf16_trains_saves_and_resumes_under_every_stage(
    config: str, lora: bool, recipe_file: Callable[..., Path], tmp_path: Path, tiny_model: Path
) -> None:
    """Gradients are summed in float32 under every stage, the save is bf16, and a resumed run is bit-identical."""
    training = {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    training |= {"num_train_epochs": ..., "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    sections = {"adapter": {"r": 4}} if lora else {}
    recipe = recipe_file(model={"dtype": "bfloat16"}, training=training, **sections)
    launch(2, config, "--recipe", recipe, logs=tmp_path / "logs").succeeded()
    saved = "adapter_model.safetensors" if lora else "model.safetensors"
    after = load_file(tmp_path / "run" / saved)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    before = load_file(tiny_model / "model.safetensors")
    assert all(not torch.equal(value, before[name].bfloat16()) for name, value in after.items() if name in before)
    half = tmp_path / "run" / "checkpoint-2"
    assert any(not torch.equal(value, after[name]) for name, value in load_file(half / saved).items())
    shutil.copytree(half, tmp_path / "resumed" / "checkpoint-2")
    outcome = launch(
        2, config, "--recipe", recipe, f"output_dir={tmp_path / 'resumed'}", logs=tmp_path / "logs"
    ).succeeded()
    assert "resuming from" in outcome.output[0]
    resumed = load_file(tmp_path / "resumed" / saved)
    assert resumed.keys() == after.keys()
    assert all(torch.equal(resumed[name], value) for name, value in after.items())
