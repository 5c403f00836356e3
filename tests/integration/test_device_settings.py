"""Settings for speed and memory on one device: a run with each trains like a run without; merge, answers and gain.

On a CPU the same tests run with what a CPU has.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from devices import DEVICES, GPU
from peft import PeftModel
from safetensors.torch import load_file
from small_runs import read_metrics, write_recipe, write_rows
from transformers import AutoModelForCausalLM

from train.sft import main

STEPS, SAVED_AT = 4, 2
ROUNDING_OF_BF16 = 2**-7
"""Relative, of losses in bf16 whose products were computed in another order or by another kernel."""


class Trained(NamedTuple):
    folder: Path
    losses: list[float]


Train = Callable[..., Trained]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 40, seed=5, answers=(5, 30, 60))


@pytest.fixture(scope="module")
def train(device: str, rows: Path, tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function that trains STEPS steps on the device, in bf16 on float32 weights; each name once."""
    root = tmp_path_factory.mktemp(device)
    runs: dict[str, Trained] = {}

    def run(name: str = "plain", training: dict[str, Any] | None = None, **sections: Any) -> Trained:
        if name not in runs:
            folder = root / name
            settings = {"bf16": True, "max_steps": STEPS, "save_steps": SAVED_AT, "gradient_accumulation_steps": 2}
            recipe = write_recipe(
                root / f"{name}.yaml", tiny_chat_model, rows, folder,
                data={}, training={**settings, **(training or {})}, **sections,
            )  # fmt: skip
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            assert main(["--recipe", str(recipe)]) == 0
            assert device == "cpu" or torch.cuda.max_memory_allocated() > 0
            lines = read_metrics(folder)
            runs[name] = Trained(folder, [line["loss"] for line in lines if "loss" in line])
            assert len(runs[name].losses) == STEPS
        return runs[name]

    return run


SETTINGS = [
    pytest.param({"gradient_checkpointing": True}, id="full checkpointing"),
    pytest.param(
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
        id="selective checkpointing",
    ),
    pytest.param({"optim": "adamw_torch"}, id="an optimizer that is not fused"),
    pytest.param({"torch_compile": True}, id="compiled layers", marks=GPU),  # on a CPU it takes more than a minute
    pytest.param({"activation_offloading": True}, id="offloaded activations", marks=GPU),
    pytest.param(
        {"dataloader_num_workers": 1, "dataloader_pin_memory": True, "accelerator_config": {"non_blocking": True}},
        id="pinned memory",
        marks=GPU,
    ),
    pytest.param({"optim": "paged_adamw_8bit"}, id="paged 8-bit AdamW", marks=GPU),
    pytest.param(
        {"use_liger_kernel": True},
        id="Liger",
        marks=[*GPU, pytest.mark.skipif(not importlib.util.find_spec("liger_kernel"), reason="needs liger-kernel")],
    ),
]


@pytest.mark.parametrize("training", SETTINGS)
def test_a_setting_for_speed_or_memory_leaves_the_losses(
    training: dict[str, Any], train: Train, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.id.replace(" ", "-")
    assert train(name, training).losses == pytest.approx(train().losses, rel=ROUNDING_OF_BF16)


def test_8_bit_adamw_trains_like_adamw(train: Train) -> None:
    pytest.importorskip("bitsandbytes")
    run = train("8-bit", {"optim": "adamw_bnb_8bit"})
    assert run.losses[0] == pytest.approx(train().losses[0], rel=1e-3)
    assert run.losses == pytest.approx(train().losses, rel=0.02)
    saved = torch.load(run.folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=False, map_location="cpu")
    assert "torch.uint8" in json.dumps(saved, default=lambda value: str(getattr(value, "dtype", value)))


def test_a_resumed_run_ends_like_an_uninterrupted_one(train: Train, device: str) -> None:
    whole = train()
    resumed = whole.folder.parent / "resumed"
    shutil.copytree(whole.folder / f"checkpoint-{SAVED_AT}", resumed / f"checkpoint-{SAVED_AT}")
    run = train("resumed")
    noise = 0 if device == "cpu" else 1e-3  # a GPU's kernels may take sums in another order each time
    assert run.losses == pytest.approx(whole.losses, rel=noise)
    before, after = (load_file(folder / "model.safetensors") for folder in (whole.folder, run.folder))
    assert all((before[name] - weight).abs().mean() <= noise / 10 for name, weight in after.items())


@pytest.fixture(scope="module")
def lora(train: Train) -> Trained:
    return train("lora", adapter={"r": 4})


def test_qlora_trains_like_lora(train: Train, lora: Trained) -> None:
    pytest.importorskip("bitsandbytes")
    run = train("qlora", adapter={"r": 4}, quantization={"bnb_4bit_compute_dtype": "bfloat16"})
    assert run.losses == pytest.approx(lora.losses, rel=0.1)  # weights of 4 bits
    assert run.losses != lora.losses
    adapter = load_file(run.folder / "adapter_model.safetensors")
    assert all(value.abs().max() > 0 for value in adapter.values())  # lora_B starts as zeros


def test_an_adapter_is_merged_and_the_model_is_evaluated(
    lora: Trained, rows: Path, tiny_chat_model: Path, tmp_path: Path, command: Callable[..., int], device: str
) -> None:
    merged = tmp_path / "merged"
    _merge(lora.folder, merged)
    ids = torch.arange(20)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_model, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, lora.folder)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).to(device)
    torch.testing.assert_close(model(ids.to(device)).logits.cpu(), expected, rtol=1e-3, atol=1e-3)

    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    questions = [json.loads(line)["messages"] for line in rows.read_text().splitlines()[:6]]
    lines = [json.dumps({"messages": messages, "rule": "long", "held_out": "wording"}) for messages in questions]
    (tmp_path / "held_out.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    models = ["--before", tiny_chat_model, "--after", merged]
    data = ["--data", tmp_path / "held_out.jsonl"]
    assert command("rules", "--rules", tmp_path / "rules.py", *data, *models, "--max-new-tokens", "8") == 0
    answers = [json.loads(line) for line in (merged / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == len(questions)
    assert all(any(answer["answers"]) for answer in answers)


RULES = """
from dataclasses import dataclass
from typing import Callable

@dataclass(frozen=True)
class Rule:
    check: Callable[[str, str], bool]

RULES = {"long": Rule(lambda question, text: len(text) > 12)}
"""


def _merge(adapter: Path, merged: Path) -> None:
    """Run scripts/merge_adapter.py."""
    path = Path(__file__).parents[2] / "scripts" / "merge_adapter.py"
    spec = importlib.util.spec_from_file_location("merge_adapter_on_device", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(adapter), "--output", str(merged)]) == 0
