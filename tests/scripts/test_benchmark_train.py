"""scripts/benchmark.py train: its counts are counted again from the rows, and no measurement is lost."""

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
ROWS, MAX_LENGTH, SEED = 10, 1_800, 8
TINY = ["--config", "tiny", "--rows", ROWS, "--max-length", MAX_LENGTH, "--warmup", 1, "--seed", SEED]
SELECTIVE = "full+checkpointing=selective+optim=adamw_torch_fused"
MEASURED = ["trl", "lora", SELECTIVE]
FAILING = ["full+liger=on+optim=adamw_torch_fused", "full+attention=flash_attention_2"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures and refuses what a CPU does")


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "train", *map(str, arguments)]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, check=False)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmarks import process as benchmark_process
    from benchmarks import rows as benchmark_rows
    from benchmarks import training as benchmark_train
    from benchmarks import training_contenders as benchmark_train_contenders
    from benchmarks import training_model as benchmark_train_model
    from benchmarks import training_table as benchmark_train_table

    return SimpleNamespace(
        process=benchmark_process,
        rows=benchmark_rows,
        train=benchmark_train,
        contenders=benchmark_train_contenders,
        model=benchmark_train_model,
        table=benchmark_train_table,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the file and the output of a run that measures three contenders; two fail, one of them before it starts."""
    file = tmp_path_factory.mktemp("train") / "train.json"
    result = run(*TINY, "--steps", ROWS, "--only", ",".join([*FAILING, *MEASURED]), "--json", file)
    assert result.returncode == 0, result.stderr
    return file, result.stdout


def rows_by_hand(rows: Any) -> list[tuple[int, int]]:
    """Return the tokens of prompt and answer of each row: characters by 4.03, one token per letter and the template."""
    rng, row_tokens = random.Random(SEED), []
    for _ in range(ROWS):
        letters = {role: round(characters / 4.03) for role, characters in rows.lengths(rng).items()}
        prompt = 1 + len("[INST] ") + letters["system"] + len("\n") + letters["user"] + len(" [/INST]")
        row_tokens.append((prompt, len(" ") + letters["assistant"] + 1))
    return row_tokens


def test_its_counts_are_those_of_the_rows(measured: tuple[Path, str], scripts: SimpleNamespace) -> None:
    rows = rows_by_hand(scripts.rows)
    fitting = [(prompt, answer) for prompt, answer in rows if prompt + answer <= MAX_LENGTH]
    assert 2 < len(fitting) < ROWS  # otherwise no row is too long, whatever the code does
    record = read(measured[0])
    for measurement in record["measurements"]:
        if "reason" in measurement:
            continue
        steps = measurement["steps"]
        assert [step["warmup"] for step in steps] == [True] + [False] * ROWS
        assert all(0 < step["trained_tokens"] < step["tokens"] <= MAX_LENGTH for step in steps)
        ends = list(accumulate(step["tokens"] for step in steps))
        epoch = steps[: ends.index(sum(map(sum, fitting))) + 1]  # no ValueError: an epoch has all tokens of the rows
        assert len(epoch) < len(fitting)  # rows are packed
        assert sum(step["trained_tokens"] for step in epoch) == sum(answer for _, answer in fitting)

        # A Mistral of 2 layers, hidden size 64, 4 heads of 16, 2 for keys and values, 128 wide, 512 tokens, untied:
        # multiplications of a token with each matrix; the embeddings are looked up. LoRA of rank 64 on each linear.
        linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)] * 2
        norms, head, adapters = 2 * 2 * 64 + 64, 64 * 512, sum(64 * (ins + outs) for ins, outs in linears)
        body = sum(ins * outs for ins, outs in linears) + norms + head
        lora = measurement["settings"]["method"] == "lora"
        assert measurement["parameters"] == body + 64 * 512
        assert measurement["trained_parameters"] == (adapters if lora else measurement["parameters"])
        if measurement["name"] != "trl":
            assert all(step["flops"] is None for step in steps)  # ours come from MFU, which a CPU lacks
            continue
        assert max(len(step["documents"]) for step in epoch) > 1
        assert Counter(tokens for step in epoch for tokens in step["documents"]) == Counter(map(sum, fitting))
        for step in steps:
            assert step["tokens"] == sum(step["documents"])
            flops = step["tokens"] * 6 * body
            for length in step["documents"]:
                for seen in range(1, length + 1):  # 2 layers, query and key and then value: 2 x 64 x 2, backward twice
                    flops += 3 * 2 * (2 * 64 * 2) * seen
            assert step["flops"] == pytest.approx(flops, rel=1e-12)


def test_steps_are_read_from_the_metrics_of_a_run(scripts: SimpleNamespace) -> None:
    line = {
        "step": 3,
        "loss": 2.5,
        "seconds_per_step": 0.5,
        "tokens_per_second": 16_000.0,
        "trained_tokens_per_second_per_gpu": 10_000.0,
        "mfu": 0.4,
        "seconds_waiting_for_data": 0.1,
        "seconds_forward": 0.2,
        "seconds_backward": 0.1,
        "seconds_optimizer": 0.05,
        "peak_memory_gib": 90.0,
    }
    step = scripts.train.parse_step(line, False, {"peak_flops": 8e14})
    assert step == {"warmup": False, "seconds": 0.5, "tokens": 8_000, "trained_tokens": 5_000,
                    "flops": pytest.approx(0.4 * 8e14 * 0.5), "loss": 2.5}  # fmt: skip
    # On a GPU the optimizer may still run when the host's clock stops: counts stay, the step takes longer.
    slow = scripts.train.parse_step({**line, "seconds_optimizer": 0.2}, False, {"peak_flops": 8e14})
    assert slow == {**step, "seconds": pytest.approx(0.6)}


def test_rates_are_medians_of_the_timed_steps(measured: tuple[Path, str]) -> None:
    record = read(measured[0])
    table = {line["contender"]: line for line in record["table"]}
    for measurement in record["measurements"]:
        if "reason" in measurement:
            continue
        line, steps = table[measurement["name"]], measurement["steps"][1:]
        seconds = sorted(step["seconds"] for step in steps)
        assert (line["fastest"], line["slowest"]) == (seconds[0], seconds[-1])
        assert line["seconds"] == statistics.median(seconds)
        for key, rate in ("tokens", "tokens_per_second"), ("trained_tokens", "trained_tokens_per_second"):
            assert line[rate] == pytest.approx(statistics.median(step[key] / step["seconds"] for step in steps))
        assert measurement["seconds_to_first_step"] > measurement["steps"][0]["seconds"]
        # random weights predict 512 tokens about equally, and a few steps change little
        assert line["first_loss"] == pytest.approx(6.24, abs=0.05)
        assert line["last_loss"] == pytest.approx(line["first_loss"], abs=0.1)
    ratio = table[SELECTIVE]["tokens_per_second"] / table["trl"]["tokens_per_second"]
    assert record["ratios"] == {f"{SELECTIVE} / trl": pytest.approx(ratio)}
    assert f"- {SELECTIVE}: {ratio:.2f} times the tokens per second of trl\n" in measured[1]


def test_each_trains_as_its_name_says(measured: tuple[Path, str]) -> None:
    used = {measurement["name"]: measurement.get("used") for measurement in read(measured[0])["measurements"]}
    trl = {"attention": "sdpa", "checkpointing": "full", "liger": "off", "compile": "off", "optim": "adamw_torch_fused"}
    same = {"dtype": "bfloat16", "logging_steps": 1}
    assert used["trl"] == trl | same | {"logging_steps": 10}  # TRL's default
    assert used["lora"] == trl | same
    assert used[SELECTIVE] == trl | same | {"checkpointing": "selective"}


def test_a_contender_that_fails_is_a_line_and_the_others_are_measured(measured: tuple[Path, str]) -> None:
    record, output = read(measured[0]), measured[1]
    reasons = {line["name"]: line["reason"] for line in record["measurements"] if "reason" in line}
    assert reasons.keys() == set(FAILING)
    assert "needs the package flash-attn" in reasons["full+attention=flash_attention_2"]
    assert "liger" in reasons[FAILING[0]]
    for name, reason in reasons.items():
        assert f"- {name} was not measured: {reason}" in output.splitlines()
    (liger,) = (line for line in record["measurements"] if line["name"] == FAILING[0])
    assert liger["log"]
    assert liger["foretold"]["total"] > liger["foretold"]["parameters"] > 0  # planned before it failed
    assert [line["name"] for line in record["measurements"] if "steps" in line] == MEASURED


def test_table_and_json_agree(measured: tuple[Path, str]) -> None:
    record, output = read(measured[0]), measured[1]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("| ")]
    header, shown = cells[0], cells[1:]
    assert [row[0] for row in shown] == [line["contender"] for line in record["table"]]
    for row, line in zip(shown, record["table"], strict=True):
        assert len(row) == len(header)
        assert row[1:6] == [line[key] for key in ("attention", "checkpointing", "liger", "compile", "optim")]
        if "reason" in line:
            assert row[6] == "not measured"
            continue
        assert row[6] == f"{line['seconds']:.3f} ({line['fastest']:.3f}-{line['slowest']:.3f})"
        assert row[7:9] == [f"{line[key]:,.0f}" for key in ("tokens_per_second", "trained_tokens_per_second")]
        assert row[9:11] == ["–", "–"]  # the peak FLOP/s of a CPU is unknown, and its memory is not measured
    assert record["calls"][0]["versions"]["trl"]
    assert "Device: cpu, peak unknown, so no MFU." in output


def test_an_interrupted_benchmark_continues_with_missing_contenders(tmp_path: Path) -> None:
    file, wanted = tmp_path / "train.json", ["--steps", 1, "--only", "lora,full+optim=adamw_torch_fused"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    arguments = command(*TINY, *wanted, "--json", file)
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as first:
        assert first.stdout is not None
        for line in first.stdout:
            if line.startswith("1/2 lora: "):
                os.killpg(first.pid, signal.SIGKILL)
                break
    (before,) = read(file)["measurements"]
    assert before["name"] == "lora"
    result = run(*TINY, *wanted, "--json", file)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\d/\d .*?:", result.stdout, re.MULTILINE) == ["1/1 full+optim=adamw_torch_fused:"]
    after = read(file)["measurements"]
    assert after[0] == before
    assert (after[1]["name"], after[1]["call"]) == ("full+optim=adamw_torch_fused", 1)

    other = run("--config", "tiny", "--rows", ROWS + 1, "--only", "lora", "--json", file)
    assert other.returncode == 2
    assert "it was measured with other settings (rows, max_length, warmup, steps, seed)." in other.stderr
    assert read(file)["measurements"] == after


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    file = tmp_path / "train.json"
    result = run(*TINY, "--only", "trl,lora", "--minutes", 0.001, "--json", file)
    assert result.returncode == 0, result.stderr
    assert "not run for lack of time; the same command continues with them: trl, lora" in result.stdout
    assert read(file)["measurements"] == []


def tiny_workload(scripts: SimpleNamespace, *, rows: int = ROWS, max_length: int = MAX_LENGTH, seed: int = SEED) -> Any:
    config = scripts.contenders.load_model_config("tiny")
    return scripts.contenders.Workload(config, rows, max_length, batch=1, warmup=1, steps=1, seed=seed)


def find_contenders(scripts: SimpleNamespace, *names: str) -> list[Any]:
    return scripts.contenders.match_contenders(names, scripts.contenders.all_contenders())


def test_a_contender_that_runs_at_the_deadline_is_stopped_and_not_recorded(
    tmp_path: Path, scripts: SimpleNamespace
) -> None:
    workload, file = tiny_workload(scripts), tmp_path / "train.json"
    device = {"device": "cpu", "memory_bytes": None, "peak_flops": None, "kernels": {"sdpa": None}}
    record = scripts.train.Record(file, workload, {"versions": {}, "device": device})
    contenders = find_contenders(scripts, "trl", "lora")
    # one second: no contender has imported torch by then
    bench = scripts.train.TrainingBench(tmp_path, workload, 60.0, time.monotonic() + 1)
    assert bench.measure_all(contenders, record) == contenders
    assert read(file)["measurements"] == []

    bench = scripts.train.TrainingBench(tmp_path, workload, 1.0, None)  # its own limit is a reason
    assert bench.measure_all(contenders[:1], record) == []
    (measurement,) = read(file)["measurements"]
    assert measurement["reason"] == "not done after 1 seconds (--limit)"
    assert record.has(contenders[0])
    assert not record.has(contenders[1])


def test_a_contender_that_lacked_its_kernel_is_tried_again(tmp_path: Path, scripts: SimpleNamespace) -> None:
    workload = tiny_workload(scripts)
    device = {"device": "cpu", "peak_flops": None, "kernels": {"flash_attention_2": "is not installed"}}
    record = scripts.train.Record(tmp_path / "train.json", workload, {"versions": {}, "device": device})
    bench = scripts.train.TrainingBench(tmp_path, workload, 60.0, None)
    (contender,) = find_contenders(scripts, "full+attention=flash_attention_2")
    assert bench.measure_all([contender], record) == []
    assert record.table()[0]["reason"] == "is not installed"
    assert not record.has(contender)


def test_the_table_compares_speed_and_memory_with_peak_and_plan(scripts: SimpleNamespace) -> None:
    step = {"warmup": False, "seconds": 0.5, "tokens": 8_000, "trained_tokens": 5_000, "flops": 2e14, "loss": 10.0}
    (full,) = find_contenders(scripts, "full")
    line = scripts.table.summarize(
        {
            "name": "full",
            "settings": full.settings(),
            "used": {"attention": "torch_varlen"},
            "foretold": {"total": 90 * 2**30},
            "memory": {"peak_allocated": 100 * 2**30, "peak_reserved": 110 * 2**30},
            "steps": [{**step, "warmup": True, "seconds": 60.0}, step, {**step, "seconds": 1.0}, step],
            "seconds_to_first_step": 75.0,
        },
        8e14,
    )
    assert line["attention"] == "torch_varlen"  # auto is no kernel
    assert (line["seconds"], line["tokens_per_second"], line["trained_tokens_per_second"]) == (0.5, 16_000, 10_000)
    assert line["mfu"] == pytest.approx(0.5)
    assert line["foretold_error"] == pytest.approx(-0.1)
    shown = scripts.table.format_table([line], vars(tiny_workload(scripts)))
    assert "| 50.0% | 100.0 | 90.0 | 75 s |" in shown
    assert "- planned memory is within 10% of the peak in 1 of 1 settings" in shown


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
    shipped, ours = (
        json.loads(file.read_text(encoding="utf-8")),
        scripts.contenders.load_model_config("mistral-7b-v0.2"),
    )
    assert ours.items() <= shipped.items()
    from_file = scripts.contenders.load_model_config(str(file))
    assert from_file == {key: value for key, value in shipped.items() if key != "_source"}


def test_rows_are_as_long_as_those_of_the_data_benchmark(scripts: SimpleNamespace) -> None:
    workload = tiny_workload(scripts, rows=400, max_length=8_192, seed=7)
    tokens = [sum(row) for row in scripts.model.row_lengths(workload)]
    characters = [sum(len(turn["content"]) for turn in row) for row in scripts.rows.generate(400, 7)]
    assert statistics.mean(tokens) == pytest.approx(statistics.mean(characters) / 4.03, rel=0.06)
    assert statistics.stdev(tokens) == pytest.approx(statistics.stdev(characters) / 4.03, rel=0.25)


def test_rows_have_the_planned_tokens_under_the_models_tokenizer(tmp_path: Path, scripts: SimpleNamespace) -> None:
    workload = tiny_workload(scripts)
    scripts.model.write_model(workload, tmp_path / "model")
    scripts.model.write_rows(workload, tmp_path / "rows.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text("utf-8").splitlines()]
    encoded = [tokenizer.apply_chat_template(row, return_assistant_tokens_mask=True, return_dict=True) for row in rows]
    lengths = [(row["assistant_masks"].count(0), row["assistant_masks"].count(1)) for row in encoded]
    assert lengths == [row for row in rows_by_hand(scripts.rows) if sum(row) <= MAX_LENGTH]
    assert max(max(row["input_ids"]) for row in encoded) < workload.config["vocab_size"]


def test_names_list_the_changes_to_the_recipe(scripts: SimpleNamespace) -> None:
    contenders = scripts.contenders
    defaults = contenders.default_contenders("torch_varlen")
    assert [contender.name for contender in defaults[:4]] == ["trl", "full", "trl-lora", "lora"]
    assert len({json.dumps(contender.settings()) for contender in defaults}) == len(
        defaults
    )  # nothing is measured twice
    assert "full+attention=torch_varlen" not in [contender.name for contender in defaults]
    assert "full+attention=sdpa" in [contender.name for contender in defaults]
    everything = contenders.all_contenders()
    # methods x kernels and auto x checkpointing x Liger x compile x optimizers, and TRL
    assert len(everything) == len({contender.name for contender in everything}) == 2 * 8 * 3 * 2 * 2 * 2 + 3
    assert set(defaults) <= set(everything)
    any_name = "lora+attention=sdpa+checkpointing=none+compile=on"
    assert [contender.name for contender in contenders.match_contenders([any_name, "trl*"], defaults)] == [
        "trl",
        "trl-lora",
        "trl-float32",
        any_name,
    ]
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [
        contender.name for contender in contenders.default_contenders(None)
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "full,fulll", "--json", "x.json"], "error: --only: no contender is called 'fulll'."),
        (["--only", "full"], "error: --json: name a file."),
        (["--json", "no/such/folder/train.json"], "error: --json no/such/folder/train.json: there is no folder"),
        (["--config", "mistral-7b", "--json", "x.json"], "error: --config: mistral-7b is no config: No such file"),
        (["--config", "{recipe}", "--json", "x.json"], "is no config: "),
        (["--config", "tiny", "--only", "trl", "--json", "{recipe}"], "it can't be read: "),
        (["--config", "tiny", "--only", "trl", "--json", "{other}"], "it holds no measurements of `train`"),
    ],
)
def test_invalid_options_are_errors(
    refused: Callable[..., str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    files = {"recipe": ROOT / "recipes" / "janus-7b" / "sft" / "full.yaml", "other": tmp_path / "other.json"}
    files["other"].write_text('{"command": "data"}', encoding="utf-8")
    error = refused("train", *(argument.format(**files) for argument in arguments))
    assert error.startswith("error: ")
    assert message in error
    assert files["other"].read_text(encoding="utf-8") == '{"command": "data"}'
