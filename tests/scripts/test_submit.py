"""scripts/submit.py without Slurm: its errors and the batch script that --print shows."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from train.recipe import load_recipe

ROOT = Path(__file__).parents[2]
ONE_NODE = ("--nodes", "1", "--gpus-per-node", "8", "--time", "24:00:00")
TWO_NODES = ("--nodes", "2", "--gpus-per-node", "h100:8", "--time", "2-12:00:00")
ARRAY = ("--array", "0-6:3%2", "seed=%a", "output_dir=outputs/run-%a")


@pytest.fixture
def printed(
    submit_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return the batch script that --print shows."""
    monkeypatch.chdir(ROOT)

    def run(recipe: Path, *arguments: str) -> str:
        capsys.readouterr()
        code = submit_script.main(["--recipe", str(recipe), *arguments, "--print"])
        written = capsys.readouterr()
        assert code == 0, written.err
        return written.out

    return run


@pytest.fixture
def refused(
    submit_script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return the text after `error:`."""
    monkeypatch.chdir(ROOT)

    def run(recipe: Path, *arguments: str) -> str:
        capsys.readouterr()
        try:
            code = submit_script.main(["--recipe", str(recipe), *arguments])
        except SystemExit as ended:
            code = ended.code
        written = capsys.readouterr()
        assert code == 2
        assert written.out == ""
        assert written.err.count("error: ") == 1
        return written.err.partition("error: ")[2]

    return run


VARIANTS = {
    "one node": ONE_NODE,
    "two nodes": TWO_NODES,
    "array": (*ONE_NODE, *ARRAY),
    "CPU": ("--nodes", "1", "--gpus-per-node", "0", "--time", "30"),
    "awkward words": (*ONE_NODE, 'output_dir=outputs/it\'s $(date) "100%"', "--setup", "module load cuda"),
}


@pytest.mark.parametrize("arguments", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_is_a_valid_shell_script_without_findings_of_shellcheck(
    arguments: tuple[str, ...], printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    script = printed(recipe_file(), *arguments)
    checked = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert not [line for line in script.splitlines() if len(line) > 160 and not line.startswith(("recipe=", "launch="))]
    if shutil.which("shellcheck"):
        # Both mistake a quote in the name of a folder for quoting.
        command = ["shellcheck", "--severity=warning", "--exclude=SC2089,SC2090", "-"]
        result = subprocess.run(command, input=script, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


def variable(script: str, name: str, **environment: str) -> list[str]:
    """Return the value of an array variable in bash, set by the part of the script before job.sh."""
    head = script.partition("# Below is")[0]
    ended = subprocess.run(
        ["bash", "-c", f'{head}\nprintf "%s\\0" "${{{name}[@]}}"'],
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return ended.stdout.split("\0")[:-1]


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH ")]
    return {name: shlex.split(value)[0] if value else "" for name, _, value in (line.partition("=") for line in lines)}


@pytest.mark.parametrize("sections", [{}, {"preference": {"loss": "dpo"}}], ids=["sft", "preference"])
def test_the_job_runs_the_command_of_its_recipe(
    sections: dict[str, dict[str, str]], printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    script = printed(recipe_file(**sections), *ONE_NODE)
    assert variable(script, "command") == ["train/preference.py" if sections else "train/sft.py"]
    assert '"$checkout/$command" "${recipe[@]}"' in script


def test_two_nodes_use_deepspeeds_standard_launcher(
    printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    recipe = recipe_file()
    script = printed(recipe, *TWO_NODES, "--partition", "big", "--sbatch=--exclude=n7", "training.max_steps=5")
    asked = directives(script)
    assert {
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "h100:8",
        "time": "2-12:00:00",
    }.items() <= asked.items()
    assert {"partition": "big", "exclude": "n7", "requeue": "", "open-mode": "append"}.items() <= asked.items()
    assert asked["signal"] == "B:USR1@600"
    launch = variable(script, "launch")
    assert launch[launch.index("--num_processes") + 1] == "16"
    assert launch[-2:] == ["--deepspeed_multinode_launcher", "standard"]
    assert launch[launch.index("--config_file") + 1] == "accelerate_configs/zero3_multinode.yaml"
    assert variable(script, "recipe") == ["--recipe", str(recipe), "training.max_steps=5"]
    assert """'trap "" TERM; exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"'""" in script


def test_each_task_of_an_array_gets_its_number_and_folder(
    printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    script = printed(recipe_file(), *ONE_NODE, *ARRAY)
    assert directives(script)["output"] == "outputs/run-%a/slurm-%A_%a.log"
    assert directives(script)["array"] == "0-6:3%2"
    assert variable(script, "recipe", SLURM_ARRAY_TASK_ID="3")[2:] == ["seed=3", "output_dir=outputs/run-3"]
    assert variable(script, "output_dir", SLURM_ARRAY_TASK_ID="6") == ["outputs/run-6"]


def test_quotes_spaces_and_percent_signs_are_passed_unchanged(
    printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    folder = 'outputs/it\'s $(date) "100%"'
    script = printed(recipe_file(), *ONE_NODE, f"output_dir={folder}")
    assert variable(script, "output_dir") == [folder]
    assert variable(script, "recipe")[-1] == f"output_dir={folder}"
    assert directives(script)["output"] == f"{folder}/slurm-%j.log".replace("100%", "100%%")  # Slurm expands %


def test_print_submits_nothing_writes_nothing_and_shows_no_secret(
    submit_script: ModuleType, recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The sbatch on the path would create a file."""
    (tmp_path / "bin").mkdir()
    trace = tmp_path / "submitted"
    (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/sh\ntouch {trace}\n")
    (tmp_path / "bin" / "sbatch").chmod(0o755)
    secrets = {"WANDB_API_KEY": "0123456789abcdef-wandb", "HF_TOKEN": "hf_secret-of-the-hub"}
    for name, value in {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", **secrets}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)
    code = submit_script.main(["--recipe", str(recipe_file()), *TWO_NODES, "--print"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    assert shown.out.startswith("#!/bin/bash\n")
    assert not trace.exists()
    assert not (tmp_path / "run").exists()
    assert not any(secret in shown.out + shown.err for secret in secrets.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"max_lenght": 5}}, "Did you mean `data.max_length`?"),
        ({"data": {"sources": [{"path": "data/nowhere.jsonl"}]}}, "data/nowhere.jsonl: there is no data in"),
        ({"model": {"name_or_path": "./nowhere"}}, "model.name_or_path: there is no folder nowhere"),
        ({"chat": {"template": "chatmll"}}, "chat.template"),
        ({"data": {"max_length": 4_096}}, "data.max_length: 4,096 is more than the 2,048 positions"),
        ({"tracking": {"wandb": {"mode": "online"}}}, "there is no key for it"),
    ],
)
def test_errors_in_the_recipe_are_found_before_submitting(
    change: dict, message: str, refused: Callable[..., str], recipe_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert message in refused(recipe_file(**change), *ONE_NODE)


def test_one_invalid_task_is_an_error(refused: Callable[..., str], recipe_file: Callable[..., Path]) -> None:
    message = refused(recipe_file(), *ONE_NODE, "--array", "1,3", "output_dir=x-%a", "training.learning_rate=%ae-")
    assert "training.learning_rate" in message


def test_check_examines_the_data_before_submitting(
    submit_script: ModuleType, recipe_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Only --check finds invalid rows; report and error are those of train/sft.py, a process of its own."""
    (tmp_path / "bad.jsonl").write_text('{"messages": [{"role": "user", "content": "and?"}]}\n')
    recipe = recipe_file(data={"sources": [{"path": str(tmp_path / "bad.jsonl")}]})
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        submit_script.main(["--recipe", str(recipe), *ONE_NODE, "--print", "--check"])
    shown = capfd.readouterr()
    assert ended.value.code == 2
    assert shown.out == ""
    assert re.search(r"^error: .*bad\.jsonl", shown.err, re.MULTILINE)


def job_options(recipe: Path, gpus: str, *more: str) -> list[str]:
    """Return options that print a job of one node with these GPUs."""
    return [*("--recipe", str(recipe), "--nodes", "1", "--gpus-per-node", gpus, "--time", "24:00:00"), *more, "--print"]


@pytest.fixture
def large(recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path) -> Path:
    """Write a recipe for a model of 16 billion parameters; its weights are never loaded and are not those of a model."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    wide = {"hidden_size": 4_096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config |= wide | {"num_hidden_layers": 72, "head_dim": 128}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    return recipe_file(model={"name_or_path": str(folder)}, training={"max_steps": 4, "num_train_epochs": ...})


@pytest.mark.parametrize(
    ("gpus", "sbatch", "needs"),
    [
        ("nvidia_a100_80gb:4", (), r"needs \d+\.\d GiB on each of 4 GPUs, and 73\.0 of their 79 GiB can be used"),
        ("h100:2", ("--array", "0-1", "seed=%a", "output_dir=outputs/run-%a"), r"of 2 GPUs, and 73\.3 of their 80 GiB"),
        ("4", ("--sbatch=--constraint=a100&40gb",), r"on each of 4 GPUs, and 36\.8 of their 40 GiB can be used"),
    ],
)
def test_a_job_that_does_not_fit_in_memory_is_submitted_with_a_warning_at_the_end(
    gpus: str, sbatch: tuple[str, ...], needs: str, submit_script: ModuleType, large: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The plan is an estimate, so the script is still printed."""
    monkeypatch.chdir(ROOT)
    assert submit_script.main(job_options(large, gpus, *sbatch)) == 0
    written = capsys.readouterr()
    assert written.out.startswith("#!/bin/bash")
    last = written.err.splitlines()[-1]
    assert last.startswith("warning: the plan says that this job does not fit: ZeRO-3 (accelerate_configs/zero3.yaml) ")
    assert re.search(needs, last)
    assert "What fits: " in last
    assert written.err.count("warning: ") == 1


@pytest.mark.parametrize(
    ("gpus", "sbatch"), [("h100:8", ()), ("4", ()), ("a100:4", ()), ("0", ()), ("h100:4", ("fsdp2",))]
)
def test_a_job_that_fits_or_has_no_plan_is_submitted_without_a_warning(
    gpus: str, sbatch: tuple[str, ...], submit_script: ModuleType, large: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """No plan: GPUs without a type, a type with two sizes, a CPU, and a strategy that the plan doesn't support."""
    monkeypatch.chdir(ROOT)
    config = ["--config", f"accelerate_configs/{sbatch[0]}.yaml"] if sbatch else []
    assert submit_script.main(job_options(large, gpus, *config)) == 0
    assert "warning: " not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--nodes", "0", "--gpus-per-node", "8", "--time", "1:00:00"), "--nodes: found 0"),
        (("--nodes", "1", "--gpus-per-node", "eight", "--time", "1:00:00"), "--gpus-per-node: found 'eight'"),
        (("--nodes", "1", "--gpus-per-node", "8", "--time", "1 day"), "--time: found '1 day'"),
        ((*ONE_NODE, "--warn-before", "86400"), "--warn-before: found 86400. Write seconds, fewer than the 86,400"),
        ((*ONE_NODE, "--array", "3-"), "--array: found '3-'"),
        ((*ONE_NODE, "--array", "3-1"), "--array: found '3-1'"),
        ((*ONE_NODE, "--sbatch=--time=5"), "--sbatch: --time is set by submit.py itself"),
        ((*ONE_NODE, "--sbatch=--export=TOKEN=abc"), "--sbatch: --export is set by submit.py itself"),
        ((*ONE_NODE[:-1], "2"), "--time: 2 is 120 s, and save.seconds_before_end is 120"),
        ((*ONE_NODE, "--array", "0-3"), "--array: all tasks would write to the same output_dir"),
        ((*ONE_NODE, "--config", "accelerate_configs/zero4.yaml"), "--config: accelerate_configs/zero4.yaml can't be read"),
        ((*ONE_NODE, "--config", "accelerate_configs/cpu.yaml"), "is for one process (distributed_type: NO)"),
        ((*ONE_NODE, "--max-restarts", "-1"), "--max-restarts: found -1"),
    ],
)  # fmt: skip
def test_errors_in_the_command_line_name_the_option_and_the_allowed_values(
    arguments: tuple[str, ...], message: str, refused: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    assert message in refused(recipe_file(), *arguments)


HSDP, HPZ = (("--config", f"accelerate_configs/{name}_multinode.yaml") for name in ("hsdp", "zero3_hpz"))


@pytest.mark.parametrize(
    ("nodes", "gpus", "config", "message"),
    [
        (1, 8, HSDP, "number of processes (8). Launch one node with accelerate_configs/fsdp2.yaml."),
        (2, 4, HSDP, "number of processes (8). In a copy of the file, write 2 (nodes) and 4 (processes of a node)."),
        (4, 8, HSDP, "number of processes (32). In a copy of the file, write 4 (nodes) and 8 "),
        (3, 4, HPZ, "zero_hpz_partition_size: 8`, which doesn't divide the 4 processes of a node. Write 4 in a copy "),
        (2, 4, HPZ, "zero_hpz_partition_size: 8`, which doesn't divide the 4 processes of a node. Write 4 in a copy "),
        (1, 8, HPZ, "keeps a second copy of the weights on each node (hpZ), which is for several. Use zero3.yaml."),
    ],
)
def test_sharding_within_nodes_must_fit_the_nodes_of_the_job(
    nodes: int, gpus: int, config: tuple[str, str], message: str, refused: Callable[..., str],
    recipe_file: Callable[..., Path],
) -> None:  # fmt: skip
    job = ("--nodes", str(nodes), "--gpus-per-node", str(gpus), "--time", "24:00:00", *config)
    error = refused(recipe_file(), *job, "training.optim=adamw_torch_fused")
    assert error.startswith(f"--config: {config[1]}: ")
    assert message in " ".join(error.split())


@pytest.mark.parametrize("config", [HSDP, HPZ])
def test_sharding_within_nodes_is_submitted_for_its_nodes(
    config: tuple[str, str], printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    assert printed(recipe_file(), *TWO_NODES, *config, "training.optim=adamw_torch_fused")


def test_full_fine_tuning_of_16_bit_weights_is_refused_where_nothing_keeps_float32_copies(
    refused: Callable[..., str], printed: Callable[..., str], recipe_file: Callable[..., Path]
) -> None:
    recipe = recipe_file(model={"dtype": "bfloat16"}, training={"bf16": True})
    ddp = ("--config", "accelerate_configs/ddp.yaml")
    assert "model.dtype: bfloat16: full fine-tuning would lose most updates" in refused(recipe, *ONE_NODE, *ddp)
    assert printed(recipe, *ONE_NODE, *ddp, "model.dtype=float32")
    assert printed(recipe, *ONE_NODE)  # zero3.yaml


def test_a_missing_sbatch_is_an_error(
    refused: Callable[..., str], recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch is not found" in refused(recipe_file(), *ONE_NODE)
    assert not (tmp_path / "run").exists()


def test_the_deepspeed_configuration_must_exist_in_the_current_folder(
    submit_script: ModuleType, recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "accelerate_configs" / "zero3.yaml")
    assert submit_script.main(["--recipe", str(recipe_file()), *ONE_NODE, "--config", config]) == 2
    assert "names ds_configs/zero3.json, which does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("90", 5_400), ("90:30", 5_430), ("1:30:00", 5_400), ("2-12", 216_000), ("2-12:30", 217_800), ("0-0:0:9", 9)],
)
def test_time_limits_are_read_as_slurm_reads_them(submit_script: ModuleType, limit: str, seconds: int) -> None:
    assert submit_script.parse_time_limit(limit) == seconds


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:False"}, "expandable_segments:False"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, None),  # PyTorch reads the older name first
    ],
)
def test_the_job_has_growing_memory_segments_unless_the_user_set_the_allocator(
    own: dict[str, str], expected: str | None
) -> None:
    script = (ROOT / "scripts" / "slurm" / "job.sh").read_text(encoding="utf-8")
    (lines,) = re.findall(r'^if \[ -z "\$\{PYTORCH_ALLOC_CONF.*?^fi$', script, re.MULTILINE | re.DOTALL)
    show = "import os; print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    command = ["bash", "-uc", f'{lines}\n"{sys.executable}" -c "{show}"']
    ended = subprocess.run(command, env=own, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == str(expected)


@pytest.mark.parametrize("name", ["dbrx", "mixtral"])
def test_a_model_without_a_plan_is_no_reason_against_a_job(
    name: str, submit_script: ModuleType, recipe_file: Callable[..., Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The class of dbrx fails on its own default config, and a mixture of experts is refused by the plan."""
    from slurm.batch_script import Task
    from slurm.submit_checks import memory_warning
    from transformers import DbrxConfig, MixtralConfig

    monkeypatch.chdir(ROOT)
    {"dbrx": DbrxConfig, "mixtral": MixtralConfig}[name]().save_pretrained(tmp_path / name)
    task = Task([], load_recipe(recipe_file(model={"name_or_path": str(tmp_path / name)})))
    options = argparse.Namespace(gpu_names=["h100"], gpus=2, nodes=1, config=Path("accelerate_configs/ddp.yaml"))
    assert memory_warning(options, {"distributed_type": "MULTI_GPU"}, [task]) is None


@pytest.mark.parametrize(
    ("sections", "config", "message"),
    [
        ({"quantization": {"bnb_4bit_quant_storage": "uint8"}}, "zero3", "quantization.bnb_4bit_quant_storage: uint8"),
        (
            {"training": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}},
            "zero3",
            "training.gradient_checkpointing_kwargs: `selective: true`",
        ),
        ({"quantization": {"bnb_4bit_quant_storage": "uint8"}}, "fsdp2", "quantization.bnb_4bit_quant_storage: uint8"),
    ],
)
def test_what_the_start_of_a_run_refuses_is_not_queued(
    sections: dict[str, dict[str, object]], config: str, message: str, refused: Callable[..., str],
    recipe_file: Callable[..., Path],
) -> None:  # fmt: skip
    adapter = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
    recipe = recipe_file(adapter=adapter, model={"dtype": "bfloat16"}, **sections)
    options = ("--config", f"accelerate_configs/{config}.yaml", "--print")
    assert refused(recipe, *ONE_NODE, *options).startswith(message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("check", [(), ("--check",)], ids=["", "check"])
def test_what_only_the_nodes_have_is_a_note(
    check: tuple[str, ...], submit_script: ModuleType, recipe_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With --check, train/sft.py writes to the same standard error."""
    arguments = [*ONE_NODE, "--print", *check, "model.attention=torch_varlen", "training.optim=grokadamw"]
    recipe = recipe_file(training={"bf16": True, "max_steps": 4, "num_train_epochs": ...})
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)
    code = submit_script.main(["--recipe", str(recipe), *arguments])
    shown = capfd.readouterr()
    assert code == 0, shown.err
    assert shown.out.startswith("#!/bin/bash")
    assert "not checked on this machine: model.attention: torch_varlen needs a CUDA device" in shown.err
    assert "not checked on this machine: training.optim: grokadamw needs the package grokadamw" in shown.err
