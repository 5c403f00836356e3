"""scripts/benchmark.py train: a dry run end to end, its counts counted again from the rows, and no measurement lost."""

import gc
import json
import random
import re
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from io import StringIO
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MistralForCausalLM

from train.loop.throughput import TIMING_METRICS

ROOT = Path(__file__).parents[2]
ROWS, MAX_LENGTH, SEED = 10, 1_800, 8
STEPS = ["full", "trl", "full+checkpointing=selective", "trl-lora", "lora+checkpointing=none+batch=2"]
FAILING = {
    "attention torch_varlen": "needs a CUDA device",
    "full+attention=flash_attention_2": "needs the package flash-attn",
}
NAMES = ["machine", "matmul", "bandwidth", "attention sdpa", *STEPS, *FAILING, "profile"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures and refuses what a CPU does")


@pytest.fixture(scope="module")
def scripts() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        import benchmark
        from benchmarks import (
            process,
            rows,
            training,
            training_inputs,
            training_settings,
            training_steps,
            training_table,
            training_worker,
        )
    return SimpleNamespace(
        main=benchmark.main,
        process=process,
        rows=rows,
        training=training,
        inputs=training_inputs,
        settings=training_settings,
        steps=training_steps,
        table=training_table,
        worker=training_worker,
    )


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, scripts: SimpleNamespace) -> tuple[dict[str, Any], list[str]]:
    """Return the record and the output of a dry run: probes, settings of which some fail, TRL's and the profile."""
    file = tmp_path_factory.mktemp("train") / "train.json"
    arguments = ["--config", "tiny", "--warmup", 1, "--steps", 2, "--max-length", 1_024, "--seed", SEED, "--json", file]
    with redirect_stdout(StringIO()) as output:
        code = scripts.main(["train", *map(str, arguments), "--only", ",".join(NAMES[1:])])
    assert code == 0
    return read(file), output.getvalue().splitlines()


def test_a_dry_run_has_a_line_for_each_measurement(measured: tuple[dict[str, Any], list[str]]) -> None:
    record, output = measured
    lines = {line["name"]: line for line in record["measurements"]}
    assert sorted(lines) == sorted(NAMES)
    shown = [
        line.partition(":")[0] for line in output if re.match(r"(machine|matmul|attention|full|trl|lora)\b.*:", line)
    ]
    assert shown == [name for name in lines if name not in ("bandwidth", "profile")]
    assert {name: line["reason"] for name, line in lines.items() if "reason" in line}.keys() == FAILING.keys()
    for name, reason in FAILING.items():
        assert reason in lines[name]["reason"]
        assert f"{name}: not measured: {lines[name]['reason']}" in output
    assert lines["machine"] | {"device": "cpu", "layers": 2, "of_layers": 2} == lines["machine"]
    for name, key in ("matmul", "flops_per_second"), ("bandwidth", "bytes_per_second"), ("attention sdpa", "seconds"):
        assert lines[name][key] > 0
    assert lines["attention sdpa"]["tokens"] == 1_024
    assert record["versions"]["trl"]


def test_rates_and_ratios_are_those_of_the_steps(measured: tuple[dict[str, Any], list[str]]) -> None:
    record, output = measured
    lines = {line["name"]: line for line in record["measurements"]}
    for name in STEPS:
        line = lines[name]
        assert line["fastest"] <= line["seconds"] <= line["slowest"]
        tokens = 1_024 * (2 if "batch=2" in name else 1)
        assert 0.3 * tokens / line["slowest"] < line["tokens_per_second"] <= tokens / line["fastest"]
        assert line["attention"] == "sdpa"
        # random weights predict 512 tokens about equally, and a few steps change little
        assert line["first_loss"] == pytest.approx(6.24, abs=0.05)
        assert line["last_loss"] == pytest.approx(line["first_loss"], abs=0.1)
        assert (line["planned_bytes"] is None) == name.startswith("trl")
    for name, trl in ("full", "trl"), (STEPS[2], "trl"), (STEPS[4], "trl-lora"):
        ratio = lines[name]["tokens_per_second"] / lines[trl]["tokens_per_second"]
        assert record["ratios"][name] == {"trl": pytest.approx(ratio)}
        (row,) = (line for line in output if line.startswith(f"| {name} |"))
        assert row.endswith(f" | {ratio:.2f} | – |")
    best = max(("full", STEPS[2]), key=lambda name: lines[name]["tokens_per_second"])
    assert record["best"]["full on several GPUs (ZeRO), bfloat16 weights"]["name"] == best
    optimizer = "adamw_bnb_8bit" if find_spec("bitsandbytes") else "adamw_torch_fused"
    assert lines["full"]["recipe"]["training"]["optim"] == lines["full"]["optimizer"] == optimizer
    assert lines["trl"]["optimizer"] == "adamw_torch_fused"
    assert any("training.gradient_accumulation_steps" in line for line in output)
    overrides = record["best"]["lora, bfloat16 weights"]["overrides"]
    assert overrides == [
        "training.per_device_train_batch_size=2",
        "training.gradient_checkpointing=false",
        "training.gradient_checkpointing_kwargs=null",
    ]
    assert f"  {' '.join(overrides)}" in output


def test_the_profile_names_kernels_and_is_written(measured: tuple[dict[str, Any], list[str]]) -> None:
    record, output = measured
    (profile,) = (line for line in record["measurements"] if line["name"] == "profile")
    assert profile["setting"] in STEPS
    assert 0 <= profile["idle_share"] < 1
    assert sum(kernel["seconds"] for kernel in profile["kernels"]) <= profile["seconds"]
    assert any("scaled_dot_product" in kernel["kernel"] for kernel in profile["kernels"])
    assert Path(profile["trace"]).stat().st_size > 0
    assert any(profile["kernels"][0]["kernel"] in line for line in output)


def rows_by_hand(rows: Any) -> list[tuple[int, int]]:
    """Return the tokens of prompt and answer of each row: characters by 4.03, one token per letter and the template."""
    rng, row_tokens = random.Random(SEED), []
    for _ in range(ROWS):
        letters = {role: round(characters / 4.03) for role, characters in rows.lengths(rng).items()}
        prompt = 1 + len("[INST] ") + letters["system"] + len("\n") + letters["user"] + len(" [/INST]")
        row_tokens.append((prompt, len(" ") + letters["assistant"] + 1))
    return row_tokens


@pytest.fixture
def inputs(tmp_path: Path, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a worker with the inputs of a workload whose steps are more than an epoch."""
    workload = scripts.inputs.Workload(scripts.inputs.load_model_config("tiny"), ROWS, MAX_LENGTH, 1, ROWS, SEED)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    task = {"workload": vars(workload), "folder": tmp_path, "trace": tmp_path / "trace", "ends": time.time() + 600}
    return scripts.worker.Worker(task)


@pytest.mark.parametrize("name", ["full", "trl"])
def test_its_counts_are_those_of_the_rows(name: str, inputs: Any, scripts: SimpleNamespace) -> None:
    fitting = [sum(row) for row in rows_by_hand(scripts.rows) if sum(row) <= MAX_LENGTH]
    assert 2 < len(fitting) < ROWS  # otherwise no row is too long, whatever the code does
    setting, config = scripts.settings.parse_setting(name), scripts.inputs.model_config(inputs.workload)
    trained = scripts.steps.train(inputs._recipe(setting), config, trl=setting.trl, callbacks=[])["steps"]
    documents = [trained.documents(step).tolist() for step in range(1 + ROWS)]
    ends = list(accumulate(map(sum, documents)))
    epoch = documents[: ends.index(sum(fitting)) + 1]  # no ValueError: an epoch has all tokens of the rows
    assert len(epoch) < len(fitting)  # rows are packed
    assert Counter(length for step in epoch for length in step) == Counter(fitting)
    assert scripts.worker._is_clean()
    models = [model for model in gc.get_objects() if isinstance(model, MistralForCausalLM)]
    assert [model for model in models if model.device.type != "meta"] == []  # the next setting needs the memory
    assert len(trained.seconds()) == 1 + ROWS
    assert sum(trained.seconds()) == pytest.approx(trained.ends[-1] - trained.ends[0])

    # The line of the same training: a Mistral of 2 layers, hidden size 64, 4 heads of 16, 2 for keys and values, 128
    # wide, 512 tokens, untied; multiplications of a token with each matrix, the embeddings are looked up.
    line = scripts.steps.summarize(trained, inputs._recipe(setting), config, inputs.workload)
    linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)] * 2
    body = sum(ins * outs for ins, outs in linears) + 2 * 2 * 64 + 64 + 64 * 512
    flops = []
    for step in documents:
        flops.append(sum(step) * 6 * body)
        for length in step:
            for seen in range(1, length + 1):  # 2 layers, query and key and then value: 2 x 64 x 2, backward twice
                flops[-1] += 3 * 2 * (2 * 64 * 2) * seen
    seconds = trained.seconds()
    timed = range(1, 1 + ROWS)
    assert line["seconds"] == statistics.median(seconds[1:])
    assert line["tokens_per_second"] == pytest.approx(
        statistics.median(sum(documents[step]) / seconds[step] for step in timed)
    )
    assert line["flops_per_second"] == pytest.approx(statistics.median(flops[step] / seconds[step] for step in timed))
    # The run's own seconds; TRL has none.
    parts = [key for key in TIMING_METRICS if key.startswith("seconds_") and name == "full"]
    assert line["logged"] == {key: statistics.median(trained.logs[step][key] for step in timed) for key in parts}


def test_a_setting_without_enough_time_is_skipped(inputs: Any) -> None:
    inputs.lines = [{"name": "machine", "took": 1.0}, {"name": "full", "seconds": 0.1, "took": 50.0}]
    inputs.ends = time.time() + 55
    assert inputs.expected_seconds("lora") == pytest.approx(60.0)
    inputs.lines.append({"name": "full+compile=on", "reason": "not done after 30 seconds (--limit)", "took": 30.0})
    assert inputs.expected_seconds("lora+compile=on") == pytest.approx(36.0)
    assert inputs.expected_seconds("matmul") == 0
    inputs.run(["full+checkpointing=none"])
    assert re.fullmatch(r"5[45] s are left, and it takes about 60", inputs.lines[-1]["skipped"])


WORKER = """
import json, os, sys, time
task = json.loads(sys.argv[1])
for name in task["names"]:
    if name == "dies":
        print("error: no room", flush=True)
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(60)
    with open(task["folder"] + "/results.jsonl", "a") as lines:
        lines.write(json.dumps({"name": name, "process": os.getpid()}) + "\\n")
    if name == "leaves memory":
        sys.exit()
"""


MACHINE = """
import json, sys
line = {"name": "machine", "device": "cpu", "memory_bytes": None, "peak_flops": None, "layers": 2, "of_layers": 2}
with open(json.loads(sys.argv[1])["folder"] + "/results.jsonl", "a") as lines:
    lines.write(json.dumps(line) + "\\n")
"""


def test_the_rest_is_measured_after_a_process_that_died_or_hung(tmp_path: Path, scripts: SimpleNamespace) -> None:
    names = ["first", "dies", "second", "leaves memory", "third", "hangs", "last"]
    lines = list(
        scripts.training.measure(
            names, {"folder": str(tmp_path)}, time.monotonic() + 60, limit=1.5, worker=[sys.executable, "-c", WORKER]
        )
    )
    assert [line["name"] for line in lines] == names
    by_name = {line["name"]: line for line in lines}
    assert by_name["dies"]["reason"] == "no room"
    assert by_name["hangs"]["reason"] == "not done after 1.5 seconds (--limit)"
    processes = [by_name[name]["process"] for name in ("first", "second", "leaves memory", "third", "last")]
    assert processes[1] == processes[2]
    assert len(set(processes)) == 4


def test_at_the_deadline_the_rest_is_skipped(tmp_path: Path, scripts: SimpleNamespace) -> None:
    lines = list(
        scripts.training.measure(
            ["first", "hangs", "last"], {"folder": str(tmp_path)}, time.monotonic() + 2, limit=60,
            worker=[sys.executable, "-c", WORKER],
        )
    )  # fmt: skip
    assert [(line["name"], line.get("skipped")) for line in lines] == [
        ("first", None), ("hangs", "stopped at the end of --minutes"), ("last", "no time is left"),
    ]  # fmt: skip


H200 = {"name": "machine", "device": "NVIDIA H200", "memory_bytes": 139 * 2**30, "peak_flops": 8e14, "layers": 32,
        "of_layers": 32}  # fmt: skip


def setting_overrides(name: str) -> list[str]:
    from benchmarks.training_settings import parse_setting

    return parse_setting(name).overrides


def step_line(name: str, speed: float, **more: Any) -> dict[str, Any]:
    return {
        "name": name, "attention": "torch_varlen", "seconds": 0.5, "fastest": 0.5, "slowest": 1.0, "start_seconds": 31.0,
        "tokens_per_second": speed, "flops_per_second": 4e14, "first_loss": 10.4, "last_loss": 10.3,
        "peak_bytes": 100 * 2**30, "planned_bytes": 90 * 2**30, "layers": 32, "optimizer": "adamw_bnb_8bit",
        "recipe": {"training": {"bf16": True}}, "overrides": [*setting_overrides(name)], **more,
    }  # fmt: skip


def test_a_run_is_compared_with_the_baseline_of_its_gpu(
    tmp_path: Path, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = scripts.table
    monkeypatch.setattr(table, "BASELINES", tmp_path)
    file = table.baseline_file("NVIDIA H200")
    assert file == tmp_path / "nvidia-h200.json"
    assert table.baseline_file("AMD Instinct MI300X (gfx942)").name == "amd-instinct-mi300x-gfx942.json"
    workload = {"max_length": 8_192, "steps": 5}
    assert table.read_baseline(file, workload) == {}
    earlier = [H200, step_line("full", 8_000.0), {"name": "trl", "reason": "out of memory"}]
    file.write_text(json.dumps({"workload": workload, "measurements": earlier}), encoding="utf-8")
    assert table.read_baseline(file, {"max_length": 4_096, "steps": 5}) == {}
    baseline = table.read_baseline(file, workload)
    lines = [H200, step_line("full", 10_000.0), step_line("full+compile=on", 12_000.0), step_line("trl", 5_000.0)]
    quotients = table.ratios(lines, baseline)
    assert quotients == {
        "full": {"trl": 2.0, "earlier": 1.25},
        "full+compile=on": {"trl": pytest.approx(2.4)},
        "trl": {},
    }
    assert table.format_line(lines[1], H200, quotients["full"]) == (
        "full: 0.500 s/step, 10,000 tokens/s, MFU 50.0%, 100.0 GiB (planned 90.0, -10.0%), start 31 s, 2.00 x TRL, "
        "1.25 x earlier"
    )
    shown = table.format_table(lines, quotients).splitlines()
    assert len({row.count("|") for row in shown if row.startswith("|")}) == 1
    assert "| full | torch_varlen | 0.500 (0.500-1.000) | 10,000 | 50.0% | 100.0 | 90.0 |" in shown[2]
    assert shown[2].endswith("| 2.00 | 1.25 |")
    assert shown[-1] == "Planned memory is within 3% of the peak in 0 of 3 settings; the worst is full: -10.0%."


@pytest.mark.parametrize(
    "other", [{"layers": 16}, {"optimizer": "adamw_torch_fused"}, {"recipe": {"training": {"bf16": False}}}]
)
def test_only_the_same_steps_are_compared(other: dict[str, Any], scripts: SimpleNamespace) -> None:
    baseline = {name: step_line(name, 8_000.0) for name in ("full", "lora")} | {"full": step_line("full", 8e3, **other)}
    lines = [H200, step_line("full", 10_000.0), step_line("lora", 4_000.0)]
    assert scripts.table.ratios(lines, baseline) == {"full": {}, "lora": {"earlier": 0.5}}


@pytest.mark.parametrize("content", ["{", "", "[]", '{"command": "train"}'])
def test_a_baseline_that_is_no_record_is_a_note(
    content: str, tmp_path: Path, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The process that measures is one that writes the line of the machine."""
    monkeypatch.setattr(scripts.table, "BASELINES", tmp_path)
    monkeypatch.setattr(scripts.training, "WORKER", (sys.executable, "-c", MACHINE))
    (tmp_path / "cpu.json").write_text(content, encoding="utf-8")
    assert scripts.main(["train", "--config", "tiny", "--only", "machine", "--json", str(tmp_path / "new.json")]) == 0
    output = capsys.readouterr().out
    assert f"note: nothing is compared with an earlier run: {tmp_path / 'cpu.json'} is no record" in output
    assert "cp " not in output  # no step was measured
    assert [line["name"] for line in read(tmp_path / "new.json")["measurements"]] == ["machine"]


def test_another_optimizer_that_was_measured_is_advised(
    scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(scripts.inputs, "missing_package", {"adamw_bnb_8bit": "bitsandbytes"}.get)
    full, lora = (scripts.settings.parse_setting(name) for name in ("full", "lora"))
    assert scripts.inputs.optimizer_overrides(full) == ["training.optim=adamw_torch_fused"]
    assert scripts.inputs.optimizer_overrides(lora) == []  # the recipe's own is PyTorch's
    other = {"optimizer": "adamw_torch_fused", "overrides": full.overrides + scripts.inputs.optimizer_overrides(full)}
    lines = [H200, step_line("full", 9_000.0, **other)]
    workload = {"config": scripts.inputs.CONFIGS["tiny"], "steps": 1, "warmup": 1, "max_length": 9, "seed": 1}
    record = {"measurements": lines, "workload": workload, "ratios": {}, "best": scripts.table.best_settings(lines)}
    scripts.training._print_summary(record, tmp_path / "x.json")
    output = capsys.readouterr().out
    assert "training.gradient_checkpointing_kwargs=null training.optim=adamw_torch_fused\n  (measured with " in output
    assert "(measured with adamw_torch_fused, as the recipe's adamw_bnb_8bit is not installed)" in output


@pytest.mark.parametrize("own", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"])
def test_the_allocator_is_that_of_the_user(
    own: str | None, tmp_path: Path, scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in scripts.training.ALLOCATOR_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv(own, "max_split_size_mb:128")
    changed = {name for name in scripts.training._environment(tmp_path) if "ALLOC_CONF" in name}
    assert changed == (set() if own else {"PYTORCH_ALLOC_CONF"})


def test_the_best_setting_of_each_group_is_one_that_its_recipe_takes(scripts: SimpleNamespace) -> None:
    lines = [
        H200, step_line("full", 9_000.0), step_line("full+checkpointing=selective+compile=on+batch=4", 12_000.0),
        step_line("full+dtype=float32", 8_000.0), step_line("trl", 99_000.0), {"name": "lora", "reason": "too slow"},
    ]  # fmt: skip
    best = scripts.table.best_settings(lines)
    assert list(best) == ["full on several GPUs (ZeRO), bfloat16 weights", "full on one GPU, float32 weights"]
    chosen = best["full on several GPUs (ZeRO), bfloat16 weights"]
    recipe = scripts.settings.parse_setting(chosen["name"]).load_recipe([])
    from train.recipe import load_recipe

    assert load_recipe(ROOT / chosen["recipe"], chosen["overrides"]).training == recipe.training
    assert recipe.training["gradient_checkpointing_kwargs"] == {"selective": True}
    assert recipe.training["per_device_train_batch_size"] == 4
    assert recipe.training["torch_compile"] is True
    assert best["full on one GPU, float32 weights"]["overrides"] == [
        "training.per_device_train_batch_size=1", "training.gradient_checkpointing=true",
        "training.gradient_checkpointing_kwargs=null", "model.dtype=float32",
    ]  # fmt: skip
    assert (chosen["optimizer"], chosen["recipe_optimizer"]) == ("adamw_bnb_8bit", "adamw_bnb_8bit")


def test_idle_time_is_what_no_kernel_covers(scripts: SimpleNamespace) -> None:
    rng = random.Random(3)
    for _ in range(50):
        intervals = [(start, start + rng.randint(0, 30)) for start in rng.choices(range(200), k=rng.randint(0, 12))]
        covered = {instant for start, end in intervals for instant in range(start, end)}
        assert scripts.steps.busy_seconds(intervals) == len(covered)


def test_a_small_gpu_gets_the_most_layers_that_the_plan_fits(inputs: Any, scripts: SimpleNamespace) -> None:
    config = scripts.inputs.load_model_config("tiny") | {"num_hidden_layers": 16}
    workload = scripts.inputs.Workload(config, ROWS, MAX_LENGTH, 1, 1, SEED)
    recipe = inputs._recipe(scripts.settings.parse_setting("full+checkpointing=none"))
    plans = {
        layers: scripts.inputs.planned_bytes(recipe, scripts.inputs.model_config(workload, layers))
        for layers in (16, 12, 8, 4, 2)
    }
    for memory in (1, plans[8], plans[12] - 1, plans[16]):
        fitting = [layers for layers, planned in plans.items() if planned <= memory]
        assert scripts.inputs.fit_layers(recipe, workload, memory) == max(fitting, default=1)


def test_out_of_memory_is_reported_as_such(tmp_path: Path, scripts: SimpleNamespace) -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with (tmp_path / "log.txt").open("w+", encoding="utf-8") as log:
        log.writelines(traceback.format_exception(raised.value))
        reason = scripts.process.failure_reason(log, 1)
    assert reason == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.write(2, b'error: no room\\nsome warning at the end\\n'); raise SystemExit(2)", "no room"),
        ("raise ImportError('a package is too old\\nupgrade it')", "ImportError: a package is too old"),
        ("print('it stops'); raise SystemExit(4)", "it stops"),
        ("raise SystemExit(4)", "exit code 4"),
        ("import os; os.write(1, b'step 3\\n'); os.kill(os.getpid(), 9)", "ended by signal 9; last line: step 3"),
    ],
)
def test_the_reason_of_a_failure_is_read_from_the_log(
    tmp_path: Path, scripts: SimpleNamespace, code: str, reason: str
) -> None:
    with (tmp_path / "log.txt").open("w+", encoding="utf-8") as log:
        exit_code = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, check=False).returncode
        assert scripts.process.failure_reason(log, exit_code) == reason


def test_the_default_model_is_mistral_7b(scripts: SimpleNamespace) -> None:
    file = ROOT / "tests" / "model_configs" / "mistral-7b-v0.2.json"
    shipped = json.loads(file.read_text(encoding="utf-8"))
    assert scripts.inputs.load_model_config("mistral-7b-v0.2").items() <= shipped.items()
    from_file = scripts.inputs.load_model_config(str(file))
    assert from_file == {key: value for key, value in shipped.items() if key != "_source"}


def test_rows_are_as_long_as_those_of_the_data_benchmark(scripts: SimpleNamespace) -> None:
    workload = scripts.inputs.Workload({}, 400, 8_192, warmup=1, steps=1, seed=7)
    tokens = [sum(row) for row in scripts.inputs.row_lengths(workload)]
    characters = [sum(len(turn["content"]) for turn in row) for row in scripts.rows.generate(400, 7)]
    assert statistics.mean(tokens) == pytest.approx(statistics.mean(characters) / 4.03, rel=0.06)
    assert statistics.stdev(tokens) == pytest.approx(statistics.stdev(characters) / 4.03, rel=0.25)


def test_rows_have_the_planned_tokens_under_the_models_tokenizer(inputs: Any, scripts: SimpleNamespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(inputs.folder / "model")
    rows = [json.loads(line)["messages"] for line in (inputs.folder / "rows.jsonl").read_text("utf-8").splitlines()]
    encoded = [tokenizer.apply_chat_template(row, return_assistant_tokens_mask=True, return_dict=True) for row in rows]
    lengths = [(row["assistant_masks"].count(0), row["assistant_masks"].count(1)) for row in encoded]
    assert lengths == [row for row in rows_by_hand(scripts.rows) if sum(row) <= MAX_LENGTH]
    assert max(max(row["input_ids"]) for row in encoded) < inputs.workload.config["vocab_size"]


def test_every_name_in_the_list_is_a_setting_that_its_recipe_takes(
    scripts: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = scripts.settings
    assert scripts.main(["train", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == list(settings.ORDER)
    assert len(set(settings.ORDER)) == len(settings.ORDER)
    others = {*settings.PROBES, *settings.KERNELS, settings.PROFILE, "attention flex_attention"}
    for name in settings.ORDER:
        setting = settings.parse_setting(name)
        assert (setting is None) == (name in others)
        if setting:
            recipe = setting.load_recipe([])
            assert recipe.training["per_device_train_batch_size"] == int(setting.changes.get("batch", 1))
            assert recipe.training["gradient_checkpointing"] == ("checkpointing=none" not in name)
            assert (recipe.adapter is not None) == ("lora" in name)
            assert setting.trl or setting.baseline in {"trl", "trl-lora", "trl+dtype=float32"}
    any_name = "lora+attention=sdpa+checkpointing=none+compile=on"
    selected = settings.select_names(f"profile,{any_name},trl*")
    assert selected == ["machine", "trl", any_name, "profile", "trl-lora", "trl+dtype=float32"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "full,fulll", "--json", "x.json"], "error: --only: no measurement is called 'fulll'."),
        (["--only", "full+checkpointing=half"], "error: --only: no measurement is called 'full+checkpointing=half'."),
        (["--only", "trl+compile=on"], "error: --only: no measurement is called 'trl+compile=on'."),
        (["--json", "no/such/folder/train.json"], "error: --json no/such/folder/train.json: there is no folder"),
        (["--config", "mistral-7b", "--json", "x.json"], "error: --config: mistral-7b is no config: No such file"),
        (["--config", "{recipe}", "--json", "x.json"], "is no config: "),
        (["--config", "{config}", "--json", "x.json"], "is a model of type 'newest', which transformers "),
        (
            ["--config", "tiny", "--max-length", "256", "--json", "x.json"],
            "--max-length: 256 is shorter than every row",
        ),
        (["--only", "full+batch=abc,full"], "training.per_device_train_batch_size: found 'abc'"),
        (["--only", "full+attention=foo"], "model.attention: found 'foo'"),
        (["--only", "full+dtype=float16"], "error: --only: no measurement is called 'full+dtype=float16'."),
        (
            ["--config", "tiny", "--only", "trl", "--json", "{other}"],
            "other.json: it exists already, and is not replaced",
        ),
        (["--config", "tiny", "--only", "trl", "--json", "/dev/full"], "--json /dev/full: it exists already"),
        (
            ["--config", "tiny", "--minutes", "0.001", "--json", "{new}"],
            "can't be measured: stopped at the end of --min",
        ),
    ],
)
def test_invalid_options_are_errors(
    refused: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    files = {"recipe": ROOT / "recipes" / "janus-7b" / "sft" / "full.yaml", "other": tmp_path / "other.json"}
    files |= {"new": tmp_path / "new.json", "config": tmp_path / "config.json"}
    files["config"].write_text('{"model_type": "newest"}', encoding="utf-8")
    files["other"].write_text('{"command": "data"}', encoding="utf-8")
    error = refused("train", *(argument.format(**files) for argument in arguments))
    assert error.startswith("error: ")
    assert message in error
    assert files["other"].read_text(encoding="utf-8") == '{"command": "data"}'
