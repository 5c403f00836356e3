"""Checkpoints: which one a run resumes from, which ones it skips or refuses, which ones it keeps."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from train.data.chat.template import use_template
from train.data.prepare import prepare
from train.errors import UserError
from train.loop.checkpoint.manifest import COMPLETE, compute_digest, format_manifest, read_checkpoint
from train.loop.checkpoint.resume import check_distribution, find_checkpoint
from train.loop.throughput import TIMING_METRICS
from train.model.tokenizer import load_tokenizer
from train.recipe import load_recipe
from train.sft import main

SAVING = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": ..., "max_steps": 2}
STEPS = 6


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Path]:
    """Return the folders of uninterrupted runs, full and with an adapter: checkpoints 2, 4 and 6, and the model."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as lines:
        for number in range(24):
            turns = [("system", "river stone"), ("user", f"cloud {number}"), ("assistant", "seven " * (1 + number * 2))]
            lines.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    runs = {}
    for kind, adapter in (("full", None), ("lora", {"r": 4})):
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
            "chat": {"template": "chatml"},
            "data": {"sources": [{"path": str(rows)}], "max_length": 128, "validation": 0.2},
            "adapter": adapter,
            "training": {
                "bf16": False,
                "gradient_checkpointing": False,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 2,
                "max_steps": STEPS,
                "logging_steps": 1,
                "eval_strategy": "steps",
                "eval_steps": 2,
                "save_strategy": "steps",
                "save_steps": 2,
            },
            "output_dir": str(folder / kind),
        }
        path = folder / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        assert main(["--recipe", str(path)]) == 0
        runs[kind] = folder / kind
    return runs


@pytest.fixture
def copied_run(uninterrupted: dict[str, Path], tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Return a function that copies checkpoints of an uninterrupted run into the folder `run`: its recipe and the folder."""

    def copy(kind: str = "full", *, checkpoints: tuple[int, ...] = (2, 4, 6), **sections: Any) -> tuple[Path, Path]:
        run = tmp_path / "run"
        for step in checkpoints:
            shutil.copytree(uninterrupted[kind] / f"checkpoint-{step}", run / f"checkpoint-{step}")
        recipe = yaml.safe_load((uninterrupted[kind].parent / f"{kind}.yaml").read_text(encoding="utf-8"))
        recipe["output_dir"] = str(run)
        for section, values in sections.items():
            recipe[section] = {**(recipe.get(section) or {}), **values} if isinstance(values, dict) else values
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path, run

    return copy


def steps(run: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*"))


def figures(run: Path) -> list[dict[str, Any]]:
    """Return metrics.jsonl without timings."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [
        {
            key: value
            for key, value in line.items()
            if key not in TIMING_METRICS and not key.endswith(("runtime", "_per_second"))
        }
        for line in lines
    ]


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same_model(run: Path, other: Path) -> None:
    name = "adapter_model.safetensors" if (other / "adapter_config.json").exists() else "model.safetensors"
    weights, others = load_file(run / name), load_file(other / name)
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)


def test_no_run_resumes_from_a_checkpoint_without_optimizer(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    """A fresh optimizer would make it another run under the same name."""
    recipe = recipe_file(training={**SAVING, "save_only_model": True})
    assert main(["--recipe", str(recipe)]) == 0
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    (tmp_path / "run" / "outcome.json").unlink()  # as of a run that was killed: one that is finished needs no optimizer
    for resume in "auto", str(checkpoint):
        error = refused("--recipe", recipe, "--resume", resume)
        assert f"{checkpoint} holds no optimizer" in error
        assert "training.save_only_model" in error
    error = refused("--recipe", recipe_file(training=SAVING))
    assert "holds no optimizer" in error  # not merely another recipe


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped(file: Path) -> None:
    """Flip one bit in the middle; the size stays the same."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def edited(file: Path) -> None:
    file.write_text(file.read_text(encoding="utf-8").replace('"seed": 42', '"seed": 43'), encoding="utf-8")


DAMAGES = [
    ("full", "model.safetensors", truncated, "is damaged"),
    ("full", "model.safetensors", flipped, "is damaged"),
    ("full", "optimizer.pt", truncated, "is damaged"),
    ("full", "optimizer.pt", flipped, "is damaged"),
    ("full", "scheduler.pt", Path.unlink, "is missing"),
    ("full", "rng_state.pth", Path.unlink, "is missing"),
    ("full", "run_state_0.json", flipped, "is damaged"),
    ("full", "trainer_state.json", truncated, "is damaged"),
    ("lora", "adapter_model.safetensors", emptied, "is damaged"),
    ("lora", "adapter_config.json", flipped, "is damaged"),
    ("full", COMPLETE, Path.unlink, "it has no COMPLETE.json"),
    ("full", COMPLETE, truncated, "is damaged"),
    ("full", COMPLETE, emptied, "is damaged"),
    ("full", COMPLETE, edited, "is damaged"),
]


@pytest.mark.parametrize(
    ("kind", "name", "damage", "message"), DAMAGES, ids=[f"{name}-{damage.__name__}" for _, name, damage, _ in DAMAGES]
)
def test_a_damaged_checkpoint_is_skipped_by_name_for_the_one_before_it(
    kind: str,
    name: str,
    damage: Callable[[Path], None],
    message: str,
    copied_run: Callable[..., tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = copied_run(kind)
    recipe = load_recipe(path)
    assert find_checkpoint("auto", recipe).step == 6  # type: ignore[union-attr]
    damage(run / "checkpoint-6" / name)
    capsys.readouterr()
    checkpoint = find_checkpoint("auto", recipe)
    assert checkpoint is not None
    assert checkpoint.folder == run / "checkpoint-4"
    output = capsys.readouterr().out
    assert "skipped: " in output
    assert str(run / "checkpoint-6") in output
    assert message in output
    if name != COMPLETE:
        assert str(run / "checkpoint-6" / name) in output
    with pytest.raises(UserError, match="--resume never"):
        find_checkpoint(str(run / "checkpoint-6"), recipe)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_that_skips_damaged_checkpoints_ends_like_an_uninterrupted_one(
    kind: str, copied_run: Callable[..., tuple[Path, Path]], uninterrupted: dict[str, Path]
) -> None:
    """The damaged ones are set aside: no resume sees them again, and none counts for save_total_limit."""
    path, run = copied_run(kind, training={"save_total_limit": 2})
    truncated(run / "checkpoint-6" / COMPLETE)
    flipped(run / "checkpoint-4" / "optimizer.pt")
    assert main(["--recipe", str(path)]) == 0
    assert_same_model(run, uninterrupted[kind])
    assert losses(run) == losses(uninterrupted[kind])  # the first steps too, of which there was no metrics.jsonl
    assert steps(run) == [4, 6]
    assert steps(run / "set-aside-1") == [4, 6]
    assert find_checkpoint("auto", load_recipe(path)).folder == run / "checkpoint-6"  # type: ignore[union-attr]


def test_no_run_starts_if_none_of_the_checkpoints_is_complete(
    copied_run: Callable[..., tuple[Path, Path]], refused: Callable[..., str]
) -> None:
    path, run = copied_run()
    (run / "checkpoint-2" / COMPLETE).unlink()
    truncated(run / "checkpoint-4" / "model.safetensors")
    shutil.rmtree(run / "checkpoint-6")
    (run / "checkpoint-6").mkdir()
    error = refused("--recipe", path)
    for message in (
        f"none of the checkpoints in {run} is complete",
        f"{run / 'checkpoint-6'} is incomplete",
        f"{run / 'checkpoint-4' / 'model.safetensors'} is damaged",
        f"{run / 'checkpoint-2'} is incomplete",
        "--resume never",
    ):
        assert message in error
    assert not (run / "metrics.jsonl").exists()
    error = refused("--recipe", path, "--resume", run / "checkpoint-4")
    assert f"{run / 'checkpoint-4' / 'model.safetensors'} is damaged" in error
    error = refused("--recipe", path, "--resume", run / "elsewhere")
    assert f"{run / 'elsewhere'} does not exist or is not a checkpoint" in error


REFUSED = [
    ("seed=43", "seed was 42 and is 43", "seed"),
    ("training.learning_rate=0.002", "training.learning_rate was 0.001 and is 0.002", "training.learning_rate"),
    ("training.optim=adafactor", "training.optim was None and is 'adafactor'", "training.optim"),
    ("training.max_steps=8", "training.max_steps was 6 and is 8", "training.max_steps"),
    ("training.weight_decay=0.1", "training.weight_decay was", "training.weight_decay"),
    ("data.max_length=256", "data.max_length was 128 and is 256", "data.max_length"),
    ("data.packing=false", "data.packing was True and is False", "data.packing"),
    ("chat.train_on=last", "chat.train_on was 'assistant' and is 'last'", "chat.train_on"),
    ("model.dtype=bfloat16", "model.dtype was 'float32' and is 'bfloat16'", "model.dtype"),
]


@pytest.mark.parametrize(("override", "message", "key"), REFUSED, ids=[override for override, _, _ in REFUSED])
def test_a_change_of_the_mathematics_is_refused_unless_resume_anyway_names_it(
    override: str,
    message: str,
    key: str,
    copied_run: Callable[..., tuple[Path, Path]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, run = copied_run()
    recipe = load_recipe(path, [override])
    with pytest.raises(UserError) as refusal:
        find_checkpoint("auto", recipe)
    assert message in str(refusal.value)
    assert f"{run / 'checkpoint-6'} belongs to another run" in str(refusal.value)
    assert f"--resume-anyway {key}" in str(refusal.value)
    keys = [word for word in str(refusal.value).split() if word.startswith(key)]
    capsys.readouterr()
    checkpoint = find_checkpoint("auto", recipe, [key, *(word.rstrip(".,;:") for word in keys)])
    assert checkpoint is not None
    output = capsys.readouterr().out
    assert f"changed since checkpoint-6: {key}" in output or f", {key}" in output
    assert "(in force from step 7)" in output
    with pytest.raises(UserError):
        find_checkpoint("auto", recipe, ["training.adam_beta1"])  # another key doesn't help


def test_a_change_without_effect_is_allowed_and_reported(
    copied_run: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path, _ = copied_run()
    changes = {
        "training.logging_steps": 2,
        "training.save_steps": 3,
        "training.gradient_checkpointing": True,
        "data.processes": 1,
        "data.cache_dir": str(tmp_path / "cache"),
    }
    checkpoint = find_checkpoint("auto", load_recipe(path, [f"{key}={value}" for key, value in changes.items()]))
    assert checkpoint is not None
    output = capsys.readouterr().out
    assert "changed since checkpoint-6: " in output
    for key, value in changes.items():
        assert re.search(f"{re.escape(key)} \\S+ -> {re.escape(json.dumps(value))}[, ]", output)


def test_writing_a_default_is_no_change(copied_run: Callable[..., tuple[Path, Path]]) -> None:
    path, _ = copied_run()
    recipe = load_recipe(path, ["training.weight_decay=0.0", "training.adam_beta1=0.9"])
    assert find_checkpoint("auto", recipe) is not None


def test_other_data_behind_the_same_recipe_is_refused(
    copied_run: Callable[..., tuple[Path, Path]], refused: Callable[..., str], tmp_path: Path
) -> None:
    """Other bytes of a source, another template file, another number of sequences per step."""
    path, run = copied_run()
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    source = Path(recipe["data"]["sources"][0]["path"])
    before = source.read_bytes()
    try:
        source.write_bytes(before.replace(b"river", b"stone", 1))
        error = refused("--recipe", path)
    finally:
        source.write_bytes(before)
    assert f"{run / 'checkpoint-6'} belongs to another run: made.tokens was" in error
    assert "the tokens of the rows of data.sources" in error
    assert "--resume-anyway made.tokens" in error
    error = refused("--recipe", path, "training.gradient_accumulation_steps=2")
    assert "training.gradient_accumulation_steps was '2 sequences a step' and is '4 sequences a step'" in error
    assert "training.per_device_train_batch_size" in error
    assert "--resume-anyway training.gradient_accumulation_steps" in error
    assert main(["--recipe", str(path), *("training.per_device_train_batch_size=1", SAME_STEP)]) == 0


SAME_STEP = "training.gradient_accumulation_steps=2"


def test_another_template_text_is_reported_if_no_token_changes(
    copied_run: Callable[..., tuple[Path, Path]],
    refused: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The finished model is saved with it; a text that changes tokens is refused."""
    from train.data.chat import template as chat_template

    shipped = (Path(chat_template.__file__).parents[1] / "templates" / "chatml.jinja").read_text(encoding="utf-8")
    template = tmp_path / "own.jinja"
    template.write_text(shipped, encoding="utf-8")
    path, run = copied_run(checkpoints=(), chat={"template": str(template)}, training={"max_steps": 2})
    assert main(["--recipe", str(path)]) == 0
    template.write_text(f"Hello\n{shipped}", encoding="utf-8")
    error = refused("--recipe", path)
    assert f"{run / 'checkpoint-2'} belongs to another run: made.tokens was" in error
    template.write_text(f"{{# another #}}{shipped}", encoding="utf-8")  # the same text for every conversation
    assert main(["--recipe", str(path)]) == 0
    assert "changed since checkpoint-2: made.template" in capsys.readouterr().out
    assert (run / "chat_template.jinja").read_text(encoding="utf-8").startswith("{# another #}")


def test_another_distribution_is_refused(copied_run: Callable[..., tuple[Path, Path]]) -> None:
    _, run = copied_run()
    checkpoint = read_checkpoint(run / "checkpoint-6")
    check_distribution(checkpoint, "one process or DDP")
    with pytest.raises(
        UserError, match="written under one process or DDP, and this run is launched as DeepSpeed ZeRO-3"
    ):
        check_distribution(checkpoint, "DeepSpeed ZeRO-3")


def test_a_finished_run_trains_no_further_when_started_again(
    copied_run: Callable[..., tuple[Path, Path]], uninterrupted: dict[str, Path]
) -> None:
    path, run = copied_run()
    for _ in range(2):
        assert main(["--recipe", str(path)]) == 0
        assert_same_model(run, uninterrupted["full"])
        assert steps(run) == [2, 4, 6]
        assert json.loads((run / "outcome.json").read_text(encoding="utf-8"))["step"] == STEPS


def test_a_checkpoint_under_the_name_of_another_step_is_skipped(
    copied_run: Callable[..., tuple[Path, Path]],
    refused: Callable[..., str],
    uninterrupted: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It would be set aside as a later checkpoint while the run resumes from it."""
    path, run = copied_run(checkpoints=(2, 4))
    (run / "checkpoint-4").rename(run / "checkpoint-99")
    message = f"{run / 'checkpoint-99'} holds step 4: rename it to checkpoint-4."
    assert message in refused("--recipe", path, "--resume", run / "checkpoint-99")
    assert steps(run) == [2, 99]
    capsys.readouterr()
    assert main(["--recipe", str(path)]) == 0
    assert f"skipped: {message}" in capsys.readouterr().out
    assert steps(run / "set-aside-1") == [99]
    assert_same_model(run, uninterrupted["full"])


OTHER_WEIGHTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "rank": ("lora", {"adapter": {"r": 8}}, "adapter.r was 4 and is 8"),
    "modules": (
        "lora",
        {"adapter": {"target_modules": ["q_proj"]}},
        'adapter.target_modules was "all-linear" and is ["q_proj"]',
    ),
    "DoRA": ("lora", {"adapter": {"use_dora": True}}, "adapter.use_dora was false and is true"),
    "whole modules": (
        "lora",
        {"adapter": {"modules_to_save": ["lm_head"]}},
        'adapter.modules_to_save was null and is ["lm_head"]',
    ),
    "no adapter": ("lora", {"adapter": None}, "it was trained with an adapter"),
    "an adapter": ("full", {"adapter": {"r": 4}}, "it was trained in full"),
}


@pytest.mark.parametrize("change", OTHER_WEIGHTS)
@pytest.mark.parametrize("allowed", [True, False])
def test_a_checkpoint_of_other_weights_is_refused_without_advice_to_resume_anyway(
    change: str,
    allowed: bool,
    copied_run: Callable[..., tuple[Path, Path]],
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No run can resume with another adapter size, or with an adapter where there was none, whatever --resume-anyway says."""
    kind, sections, message = OTHER_WEIGHTS[change]
    path, run = copied_run(kind, checkpoints=(6,), **sections)
    keys = ("adapter.r", "adapter.target_modules", "adapter.use_dora", "adapter.modules_to_save")
    anyway = [f"--resume-anyway={key}" for key in keys] if allowed else []
    for check in ["--check"], []:
        error = refused("--recipe", path, *check, *anyway)
        assert error.startswith(f"--resume: {run / 'checkpoint-6'} can't be loaded into this run: adapter")
        assert f"the checkpoint holds others ({message})" in error
        assert "--resume-anyway" not in error
    with pytest.raises(UserError):
        find_checkpoint("auto", load_recipe(path))
    assert "changed since" not in capsys.readouterr().out


def test_an_adapters_modules_in_another_order_are_no_change(
    copied_run: Callable[..., tuple[Path, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, run = copied_run("lora", checkpoints=(6,))
    manifest = json.loads((run / "checkpoint-6" / COMPLETE).read_text(encoding="utf-8"))
    manifest["run"]["adapter.target_modules"] = ["q_proj", "v_proj"]
    manifest["digest"] = compute_digest(manifest)
    (run / "checkpoint-6" / COMPLETE).write_text(json.dumps(manifest), encoding="utf-8")
    assert find_checkpoint("auto", load_recipe(path, ["adapter.target_modules=[v_proj, q_proj]"])) is not None
    assert "changed since" not in capsys.readouterr().out
    with pytest.raises(UserError, match="decides which weights are trained"):
        find_checkpoint("auto", load_recipe(path, ["adapter.target_modules=[v_proj, k_proj]"]))


def test_a_check_refuses_another_optimizer_for_a_checkpoint_of_deepspeed(
    copied_run: Callable[..., tuple[Path, Path]], refused: Callable[..., str]
) -> None:
    path, run = copied_run(checkpoints=(6,), training={"optim": "adafactor"})
    manifest = json.loads((run / "checkpoint-6" / COMPLETE).read_text(encoding="utf-8"))
    manifest["distribution"] = "DeepSpeed ZeRO-2"
    manifest["digest"] = compute_digest(manifest)
    (run / "checkpoint-6" / COMPLETE).write_text(json.dumps(manifest), encoding="utf-8")
    error = refused("--recipe", path, "--resume-anyway", "training.optim", "--check")
    assert "holds the optimizer adamw_torch" in error
    assert "DeepSpeed loads weights and optimizer together" in error


def test_lost_lines_of_metrics_are_restored_from_the_checkpoint(
    copied_run: Callable[..., tuple[Path, Path]], uninterrupted: dict[str, Path]
) -> None:
    """After a power failure the synced checkpoint remains without them; a run in another folder never had them."""
    path, run = copied_run(checkpoints=(2, 4))
    lines = (uninterrupted["full"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for kept in ([], lines[:1], lines[1:3]):
        (run / "metrics.jsonl").write_text("".join(kept), encoding="utf-8")
        assert main(["--recipe", str(path)]) == 0
        assert figures(run) == figures(uninterrupted["full"])
        after = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        assert [json.loads(line) for line in after[:6]] == [json.loads(line) for line in lines[:6]]
        shutil.rmtree(run / "checkpoint-6")


@pytest.mark.parametrize("max_steps", [STEPS, 5])
def test_work_at_the_end_of_an_epoch_is_done_after_a_kill(
    max_steps: int, copied_run: Callable[..., tuple[Path, Path]]
) -> None:
    """Checkpoint 5 was written at the last step of an epoch, before the work at its end."""
    epochs = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_steps": 5, "max_steps": max_steps}
    path, run = copied_run(checkpoints=(), training=epochs)
    assert main(["--recipe", str(path)]) == 0
    expected = figures(run)
    assert [line["step"] for line in expected] == [5, 5] + [6, 6] * (max_steps == STEPS)
    for lost in ("metrics.jsonl", "outcome.json"):
        (run / lost).unlink()
    if max_steps == STEPS:
        shutil.rmtree(run / "checkpoint-6", ignore_errors=True)
    assert main(["--recipe", str(path)]) == 0
    assert figures(run) == expected


STOPPED = {
    "no": {"save_strategy": "no"},
    "epoch": {"save_strategy": "epoch", "eval_strategy": "epoch"},
    "best": {"save_strategy": "best", "eval_steps": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True},
}


@pytest.mark.parametrize("strategy", STOPPED)
def test_a_run_stopped_at_its_first_step_ends_like_an_uninterrupted_one(
    strategy: str, copied_run: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A stop saves a checkpoint under every save strategy."""
    path, run = copied_run(checkpoints=(), training=STOPPED[strategy])
    assert main(["--recipe", str(path)]) == 0
    expected = run.rename(tmp_path / "expected")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")  # long ago
    for step in (1, 1 if strategy == "best" else 2):  # an evaluation that is due comes before a step, and is given up
        assert main(["--recipe", str(path)]) == 0
        ended = json.loads((run / "outcome.json").read_text(encoding="utf-8"))
        assert (ended["outcome"], ended["step"]) == ("preempted", step)
        assert steps(run)[-1] == step
        assert not (run / "model.safetensors").exists()
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    assert main(["--recipe", str(path)]) == 0
    assert_same_model(run, expected)
    assert figures(run) == figures(expected)


def test_a_stop_request_at_the_last_step_finishes_the_run(
    copied_run: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = copied_run(checkpoints=(), training={"max_steps": 1, "save_strategy": "no"})
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1")
    assert main(["--recipe", str(path)]) == 0
    assert json.loads((run / "outcome.json").read_text(encoding="utf-8"))["outcome"] == "finished"
    assert (run / "model.safetensors").exists()
    assert steps(run) == []


def test_resume_anyway_refuses_an_unknown_key(copied_run: Callable[..., tuple[Path, Path]]) -> None:
    path, _ = copied_run()
    with pytest.raises(UserError, match=r"--resume-anyway data\.max_lenght: .* Did you mean data\.max_length"):
        find_checkpoint("auto", load_recipe(path, ["data.max_length=256"]), ["data.max_lenght"])


def test_checkpoints_of_a_runs_own_future_are_set_aside(
    copied_run: Callable[..., tuple[Path, Path]], uninterrupted: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that starts from the beginning or from an older checkpoint is not mixed with later ones; nothing is deleted."""
    path, run = copied_run(training={"save_total_limit": 2})
    main(["--recipe", str(path), "--resume", str(run / "checkpoint-2"), "--resume-anyway=seed", "seed=43"])
    assert steps(run) == [4, 6]  # retention took the old 2, and not one of its own
    assert steps(run / "set-aside-1") == [4, 6]
    assert all(read_checkpoint(run / f"checkpoint-{step}").manifest["run"]["seed"] == 43 for step in (4, 6))
    assert "checkpoint-4, checkpoint-6. Delete them when you like." in capsys.readouterr().out
    main(["--recipe", str(path), "--resume", "never"])
    assert steps(run / "set-aside-2") == [4, 6]
    assert steps(run) == [4, 6]
    assert_same_model(run, uninterrupted["full"])
    assert losses(run) == losses(uninterrupted["full"])


@pytest.mark.parametrize("best", [False, True])
def test_save_total_limit_keeps_the_newest_and_the_best_checkpoints(
    best: bool, copied_run: Callable[..., tuple[Path, Path]]
) -> None:
    """At a learning rate that ruins the model the first evaluation stays the best."""
    settings = {"load_best_model_at_end": True, "metric_for_best_model": "loss"} if best else {}
    training = {"save_total_limit": 1, "learning_rate": 3.0, "lr_scheduler_type": "constant", **settings}
    path, run = copied_run(checkpoints=(), training=training)
    assert main(["--recipe", str(path)]) == 0
    assert steps(run) == ([2, 6] if best else [6])
    assert_same_model(run, run / ("checkpoint-2" if best else "checkpoint-6"))


def test_the_best_checkpoint_is_found_after_the_run_was_moved(
    copied_run: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"learning_rate": 3.0, "lr_scheduler_type": "constant", "load_best_model_at_end": True}
    path, run = copied_run(checkpoints=(), training=training)
    assert main(["--recipe", str(path)]) == 0
    best = load_file(run / "checkpoint-2" / "model.safetensors")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for step in 2, 4:
        (run / f"checkpoint-{step}").rename(elsewhere / f"checkpoint-{step}")
    shutil.rmtree(run)
    recipe = str(path)
    assert main(["--recipe", recipe, "--resume", str(elsewhere / "checkpoint-4")]) == 0
    assert torch.equal(load_file(run / "model.safetensors")["model.norm.weight"], best["model.norm.weight"])
    shutil.rmtree(run)
    shutil.rmtree(elsewhere / "checkpoint-2")
    capsys.readouterr()
    assert main(["--recipe", recipe, "--resume", str(elsewhere / "checkpoint-4")]) == 0
    assert "warning: the best model so far, checkpoint-2" in capsys.readouterr().out


def test_a_run_resumes_from_mirrored_checkpoints_when_the_originals_are_gone(
    copied_run: Callable[..., tuple[Path, Path]],
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror = tmp_path / "mirror"
    path, run = copied_run(checkpoints=(), save={"mirror_dir": str(mirror)}, training={"save_total_limit": 2})
    (mirror / "checkpoint-9.unfinished").mkdir(parents=True)  # of a run that was killed as it copied
    assert main(["--recipe", str(path)]) == 0
    assert steps(mirror) == steps(run) == [4, 6]
    assert {child.name for child in mirror.iterdir()} == {"checkpoint-4", "checkpoint-6"}
    shutil.rmtree(run)
    flipped(mirror / "checkpoint-6" / "optimizer.pt")
    capsys.readouterr()
    assert main(["--recipe", str(path)]) == 0
    output = capsys.readouterr().out
    assert f"{mirror / 'checkpoint-6' / 'optimizer.pt'} is damaged" in output
    assert f"resuming from {mirror / 'checkpoint-4'}" in output
    assert_same_model(run, uninterrupted["full"])
    assert steps(mirror) == [4, 6]
    assert find_checkpoint(str(mirror / "checkpoint-6"), load_recipe(path)) is not None


def test_a_mirror_in_the_runs_own_folder_is_refused(
    copied_run: Callable[..., tuple[Path, Path]], refused: Callable[..., str]
) -> None:
    """Each copy would replace the checkpoint that it is copied from, which is deleted first."""
    path, run = copied_run()
    assert "save.mirror_dir" in refused("--recipe", path, f"save.mirror_dir={run.parent}/./run")
    assert steps(run) == [2, 4, 6]


def test_a_failing_mirror_is_only_a_warning(
    copied_run: Callable[..., tuple[Path, Path]],
    uninterrupted: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mirror = tmp_path / "mirror"
    mirror.write_text("not a folder", encoding="utf-8")
    path, run = copied_run(checkpoints=(), save={"mirror_dir": str(mirror)})
    assert main(["--recipe", str(path)]) == 0
    assert "warning: save.mirror_dir: checkpoint-6 was not copied" in capsys.readouterr().out
    assert_same_model(run, uninterrupted["full"])


HOLD = """
import fcntl, sys
with open(sys.argv[1], "a+") as lock:
    fcntl.lockf(lock, fcntl.LOCK_EX)
    lock.write("process 1 on elsewhere")
    lock.flush()
    print(flush=True)
    sys.stdin.read()
"""


def test_two_runs_never_write_to_one_folder(
    copied_run: Callable[..., tuple[Path, Path]], refused: Callable[..., str], uninterrupted: dict[str, Path]
) -> None:
    path, run = copied_run(checkpoints=(4,))
    command = [sys.executable, "-c", HOLD, str(run / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        error = refused("--recipe", path)
        assert f"output_dir: another run is writing to {run} (process 1 on elsewhere)" in error
        assert not (run / "recipe.yaml").exists()
        assert main(["--recipe", str(path), "--check"]) == 0  # it writes nothing
        other.kill()  # the lock goes with the process
    assert main(["--recipe", str(path)]) == 0
    assert_same_model(run, uninterrupted["full"])


def test_a_linked_folder_resumes_from_a_checkpoint_elsewhere(
    copied_run: Callable[..., tuple[Path, Path]], uninterrupted: dict[str, Path], tmp_path: Path
) -> None:
    path, run = copied_run()
    disk, copied = tmp_path / "disk", tmp_path / "copied"
    shutil.move(run / "checkpoint-4", copied)  # its name says nothing any more
    shutil.rmtree(run)
    disk.mkdir()
    run.symlink_to(disk)
    assert main(["--recipe", str(path), "--resume", str(copied)]) == 0
    assert_same_model(run, uninterrupted["full"])
    assert run.is_symlink()
    assert steps(disk) == [6]
    assert copied.is_dir()


def test_weights_of_an_earlier_run_are_deleted(
    copied_run: Callable[..., tuple[Path, Path]], uninterrupted: dict[str, Path]
) -> None:
    """Shards of a larger model would be loaded in place of the new weights."""
    path, run = copied_run()
    for number in 1, 2:
        (run / f"model-0000{number}-of-00002.safetensors").write_bytes(b"earlier")
    (run / "model.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    assert main(["--recipe", str(path)]) == 0
    assert {file.name for file in run.glob("*.safetensors*")} == {"model.safetensors"}
    assert_same_model(run, uninterrupted["full"])


def test_the_manifest_counts_consumed_sequences_and_tokens(uninterrupted: dict[str, Path]) -> None:
    run = uninterrupted["full"]
    recipe = load_recipe(run.parent / "full.yaml")
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, "chatml")
    sequences = len(prepare(recipe, tokenizer).train.dataset)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for step in 2, 4, 6:
        manifest = read_checkpoint(run / f"checkpoint-{step}").manifest
        assert manifest["step"] == step
        assert manifest["tokens"] == next(line["num_tokens"] for line in lines if line["step"] == step)
        assert manifest["sequences"] == round(manifest["epoch"] * sequences)
        assert json.loads(format_manifest(manifest))["digest"] == compute_digest(manifest)
        listed = set(manifest["files"])
        assert listed == {path.name for path in (run / f"checkpoint-{step}").iterdir()} - {COMPLETE}


def test_wandb_continues_the_same_run(
    copied_run: Callable[..., tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    path, run = copied_run(
        checkpoints=(), tracking={"wandb": {"project": "tests", "mode": "offline"}}, training={"max_steps": 4}
    )
    assert main(["--recipe", str(path)]) == 0
    first = read_checkpoint(run / "checkpoint-2").manifest["wandb_run"]
    assert first
    shutil.rmtree(run / "checkpoint-4")
    assert main(["--recipe", str(path)]) == 0
    assert read_checkpoint(run / "checkpoint-4").manifest["wandb_run"] == first
    assert len(list((run / "wandb").glob(f"offline-run-*-{first}"))) == 2


def test_half_a_line_of_metrics_after_a_crash_is_skipped(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    recipe = str(recipe_file(training={**SAVING, "max_steps": 4}))
    assert main(["--recipe", recipe]) == 0
    run = tmp_path / "run"
    (run / "checkpoint-4" / "COMPLETE.json").unlink()
    metrics = run / "metrics.jsonl"
    before = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    metrics.write_text(metrics.read_text(encoding="utf-8")[:-30], encoding="utf-8")
    assert main(["--recipe", recipe]) == 0
    after = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in after] == [(line["step"], line["loss"]) for line in before]
