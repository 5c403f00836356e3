"""scripts/benchmark.py train: what it counts is counted again from the rows, and nothing that was measured is lost."""

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
ROWS, MAX_LENGTH, SEED = 10, 1_800, 8
TINY = ["--config", "tiny", "--rows", ROWS, "--max-length", MAX_LENGTH, "--warmup", 1, "--seed", SEED]
SELECTIVE = "full+checkpointing=selective+optim=adamw_torch_fused"
MEASURED = ["trl", "lora", SELECTIVE]
FAILING = ["full+liger=on+optim=adamw_torch_fused", "full+attention=flash_attention_2"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what is measured and refused here is a CPU's")


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
    from benchmarks import training_settings as benchmark_train_settings
    from benchmarks import training_table as benchmark_train_table

    return SimpleNamespace(
        process=benchmark_process,
        rows=benchmark_rows,
        train=benchmark_train,
        contenders=benchmark_train_contenders,
        settings=benchmark_train_settings,
        table=benchmark_train_table,
    )


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The file and the output of a run in which three contenders are measured and two fail, one before it starts."""
    file = tmp_path_factory.mktemp("train") / "train.json"
    result = run(*TINY, "--steps", ROWS, "--only", ",".join([*FAILING, *MEASURED]), "--json", file)
    assert result.returncode == 0, result.stderr
    return file, result.stdout


def rows_by_hand(rows: Any) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of each row: characters by 4.03, 10 for the template, 1 for the end."""
    chance, found = random.Random(SEED), []
    for _ in range(ROWS):
        characters = rows.lengths(chance)
        prompt = round((characters["system"] + characters["user"]) / 4.03) + 10
        found.append((prompt, round(characters["assistant"] / 4.03) + 1))
    return found


def test_its_counts_are_those_of_the_rows(measured: tuple[Path, str], scripts: SimpleNamespace) -> None:
    rows = rows_by_hand(scripts.rows)
    fitting = [(prompt, answer) for prompt, answer in rows if prompt + answer <= MAX_LENGTH]
    assert 2 < len(fitting) < ROWS  # otherwise nothing was left out, whatever the code did
    record = read(measured[0])
    for one in record["measurements"]:
        if "reason" in one:
            continue
        steps = one["steps"]
        assert [step["warmup"] for step in steps] == [True] + [False] * ROWS
        epoch = steps[: one["sequences"]]
        assert max(len(step["documents"]) for step in epoch) > 1  # otherwise it is all one which documents see which
        assert Counter(n for step in epoch for n in step["documents"]) == Counter(map(sum, fitting))
        assert sum(step["tokens"] for step in epoch) == sum(map(sum, fitting))
        assert sum(step["trained_tokens"] for step in epoch) == sum(answer for _, answer in fitting)
        assert all(step["tokens"] == sum(step["documents"]) <= MAX_LENGTH for step in steps)

        # A Mistral of 2 layers, hidden size 64, 4 heads of 16, 2 for keys and values, 128 wide, 512 tokens, untied:
        # multiplications of a token with each matrix; the embeddings are looked up. LoRA of rank 64 on each linear.
        linears = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)] * 2
        norms, head, adapters = 2 * 2 * 64 + 64, 64 * 512, sum(64 * (ins + outs) for ins, outs in linears)
        body = sum(ins * outs for ins, outs in linears) + norms + head
        lora = one["settings"]["method"] == "lora"
        assert one["parameters"] == body + 64 * 512
        assert one["trained_parameters"] == (adapters if lora else one["parameters"])
        for step in steps:
            flops = step["tokens"] * ((4 * body + 6 * adapters) if lora else 6 * body)
            for length in step["documents"]:
                for seen in range(1, length + 1):  # 2 layers, query and key and then value: 2 x 64 x 2, backward twice
                    flops += 3 * 2 * (2 * 64 * 2) * seen
            assert step["flops"] == pytest.approx(flops, rel=1e-12)


def test_rates_are_medians_of_the_steps_that_count(measured: tuple[Path, str]) -> None:
    record = read(measured[0])
    table = {line["contender"]: line for line in record["table"]}
    for one in record["measurements"]:
        if "reason" in one:
            continue
        line, steps = table[one["name"]], one["steps"][1:]
        seconds = sorted(step["seconds"] for step in steps)
        assert (line["fastest"], line["slowest"]) == (seconds[0], seconds[-1])
        assert line["seconds"] == statistics.median(seconds)
        for key, rate in ("tokens", "tokens_per_second"), ("trained_tokens", "trained_tokens_per_second"):
            assert line[rate] == pytest.approx(statistics.median(step[key] / step["seconds"] for step in steps))
        assert one["seconds_to_first_step"] > one["steps"][0]["seconds"]
        # random weights: as unsure as a dice of 512 sides, and a few steps change little
        assert line["first_loss"] == pytest.approx(6.24, abs=0.05)
        assert line["last_loss"] == pytest.approx(line["first_loss"], abs=0.1)
    ratio = table[SELECTIVE]["tokens_per_second"] / table["trl"]["tokens_per_second"]
    assert record["ratios"] == {f"{SELECTIVE} / trl": pytest.approx(ratio)}
    assert f"- {SELECTIVE}: {ratio:.2f} times as many tokens a second as trl\n" in measured[1]


def test_each_trains_as_its_name_says(measured: tuple[Path, str]) -> None:
    used = {one["name"]: one.get("used") for one in read(measured[0])["measurements"]}
    trl = {"attention": "sdpa", "checkpointing": "full", "liger": "off", "compile": "off", "optim": "adamw_torch_fused"}
    same = {"dtype": "bfloat16", "logging_steps": 1}
    assert used["trl"] == trl | same | {"logging_steps": 10}
    assert used["lora"] == trl | same
    assert used[SELECTIVE] == trl | same | {"checkpointing": "selective"}


def test_one_that_fails_is_a_line_and_the_others_are_measured(measured: tuple[Path, str]) -> None:
    record, output = read(measured[0]), measured[1]
    reasons = {one["name"]: one["reason"] for one in record["measurements"] if "reason" in one}
    assert reasons.keys() == set(FAILING)
    assert "needs the package flash-attn" in reasons["full+attention=flash_attention_2"]
    assert "liger" in reasons[FAILING[0]]
    for name, reason in reasons.items():
        assert f"- {name} was not measured: {reason}" in output.splitlines()
    (liger,) = (one for one in record["measurements"] if one["name"] == FAILING[0])
    assert liger["log"]
    assert liger["foretold"]["total"] > liger["foretold"]["parameters"] > 0  # known before it failed
    assert [one["name"] for one in record["measurements"] if "steps" in one] == MEASURED


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
        assert row[9:12] == ["–", "–", "–"]  # a CPU has no peak that is known, and its memory is not watched
    assert record["calls"][0]["versions"]["trl"]
    assert "Device: cpu, peak unknown, so no MFU." in output


def test_cut_off_it_goes_on_with_what_is_missing(tmp_path: Path) -> None:
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
    assert "not run for lack of time, the same command goes on with them: trl, lora" in result.stdout
    assert read(file)["measurements"] == []


def test_what_runs_at_the_deadline_is_stopped_and_counts_as_not_run(tmp_path: Path, scripts: SimpleNamespace) -> None:
    lengths = scripts.settings.Lengths(scripts.settings.model_config("tiny"), ROWS, MAX_LENGTH, 1, 1, 1, SEED)
    file = tmp_path / "train.json"
    device = {"device": "cpu", "peak_flops": None, "kernels": {"sdpa": None}}
    record = scripts.train.Record(file, lengths, {"versions": {}, "device": device})
    options = scripts.train.Options(file, lengths, None, False, False, None, 60.0)
    contenders = [scripts.settings.by_name(name) for name in ("lora", "trl")]
    # one second: none has imported torch by then
    left = scripts.train.measure_all(contenders, record, options, tmp_path, time.monotonic() + 1)
    assert left == contenders
    assert read(file)["measurements"] == []

    options = scripts.train.Options(file, lengths, None, False, False, None, 1.0)  # its own limit is a reason
    assert scripts.train.measure_all(contenders[:1], record, options, tmp_path, None) == []
    (one,) = read(file)["measurements"]
    assert one["reason"] == "not done after 1 seconds (--limit)"
    assert record.has(contenders[0])
    assert not record.has(contenders[1])


def test_a_kernel_that_was_refused_is_asked_again(tmp_path: Path, scripts: SimpleNamespace) -> None:
    lengths = scripts.settings.Lengths(scripts.settings.model_config("tiny"), ROWS, MAX_LENGTH, 1, 1, 1, SEED)
    device = {"device": "cpu", "peak_flops": None, "kernels": {"flash_attention_2": "is not installed"}}
    record = scripts.train.Record(tmp_path / "train.json", lengths, {"versions": {}, "device": device})
    options = scripts.train.Options(tmp_path / "train.json", lengths, None, False, False, None, 60.0)
    contender = scripts.settings.by_name("full+attention=flash_attention_2")
    assert scripts.train.measure_all([contender], record, options, tmp_path, None) == []
    assert record.table()[0]["reason"] == "is not installed"
    assert not record.has(contender)


def test_memory_and_share_of_the_peak_are_worked_out(scripts: SimpleNamespace) -> None:
    step = {"warmup": False, "seconds": 0.5, "tokens": 8_000, "trained_tokens": 5_000, "flops": 2e14, "loss": 10.0}
    line = scripts.table.line_of(
        {
            "name": "full",
            "settings": scripts.settings.by_name("full").settings(),
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
    config = scripts.settings.model_config("tiny")
    lengths = scripts.settings.Lengths(config, ROWS, MAX_LENGTH, 1, 1, 3, SEED)
    shown = scripts.table.markdown([line], vars(lengths))
    assert "| 50.0% | 100.0 | 110.0 | 90.0 | 75 s |" in shown
    assert "- the plan's memory is within 10% of the peak in 1 of 1 settings" in shown


def test_out_of_memory_is_told_as_such(scripts: SimpleNamespace) -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate 2.00 GiB.")
    assert scripts.contenders.reason(raised.value) == "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert scripts.contenders.reason(KeyError("x")) == "KeyError: 'x'"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.write(2, b'error: no room\\nsome warning at the end\\n'); raise SystemExit(2)", "no room"),
        ("raise ImportError('a package is too old\\nupgrade it')", "ImportError: a package is too old"),
        ("print('it stops'); raise SystemExit(4)", "it stops"),
        ("raise SystemExit(4)", "exit code 4"),
    ],
)
def test_why_a_process_failed_is_found_in_what_it_wrote(
    tmp_path: Path, scripts: SimpleNamespace, code: str, said: str
) -> None:
    with (tmp_path / "log.txt").open("w+", encoding="utf-8") as log:
        code_of_exit = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, check=False).returncode
        assert scripts.process.last_words(log, code_of_exit) == said


def test_the_default_model_is_mistral_7b(scripts: SimpleNamespace) -> None:
    file = ROOT / "tests" / "model_configs" / "mistral-7b-v0.2.json"
    shipped, ours = json.loads(file.read_text(encoding="utf-8")), scripts.settings.model_config("mistral-7b-v0.2")
    assert ours.items() <= shipped.items()
    from_file = scripts.settings.model_config(str(file))
    assert from_file == {key: value for key, value in shipped.items() if key != "_source"}


def test_rows_are_as_long_as_those_of_the_data_benchmark(scripts: SimpleNamespace) -> None:
    wanted = scripts.settings.Lengths(scripts.settings.model_config("tiny"), 400, 8_192, 1, 1, 1, 7)
    tokens = [sum(row) for row in scripts.contenders.row_lengths(wanted)]
    characters = [sum(len(turn["content"]) for turn in row) for row in scripts.rows.generate(400, 7)]
    assert statistics.mean(tokens) == pytest.approx(statistics.mean(characters) / 4.03, rel=0.06)
    assert statistics.stdev(tokens) == pytest.approx(statistics.stdev(characters) / 4.03, rel=0.25)
    ids = [ids for ids, _ in scripts.contenders.token_ids(wanted)]
    assert [len(row) for row in ids] == tokens
    assert min(map(min, ids)) >= 3
    assert max(map(max, ids)) < 512


def test_names_say_what_differs_from_the_recipe(scripts: SimpleNamespace) -> None:
    settings = scripts.settings
    usual = settings.usual("torch_varlen")
    assert [one.name for one in usual[:4]] == ["trl", "full", "trl-lora", "lora"]
    assert len({json.dumps(one.settings()) for one in usual}) == len(usual)  # none is measured twice
    assert "full+attention=torch_varlen" not in [one.name for one in usual]
    assert "full+attention=sdpa" in [one.name for one in usual]
    everything = settings.every()
    # methods x kernels and auto x checkpointing x Liger x compile x optimizers, and TRL
    assert len(everything) == len({one.name for one in everything}) == 2 * 8 * 3 * 2 * 2 * 2 + 3
    assert set(usual) <= set(everything)
    any_name = "lora+attention=sdpa+checkpointing=none+compile=on"
    assert [one.name for one in settings.chosen([any_name, "trl*"], usual)] == [
        "trl",
        "trl-lora",
        "trl-float32",
        any_name,
    ]
    listed = run("--list")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [one.name for one in settings.usual(None)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "full,fulll", "--json", "x.json"], "error: --only: no contender is called 'fulll'."),
        (["--only", "full"], "error: --json: name a file."),
        (["--json", "no/such/folder/train.json"], "error: --json no/such/folder/train.json: there is no folder"),
        (["--config", "mistral-7b", "--json", "x.json"], "error: --config: mistral-7b is no config: No such file"),
        (["--config", "{recipe}", "--json", "x.json"], "is no config: "),
        (["--config", "tiny", "--only", "trl", "--json", "{recipe}"], "it can't be read: "),
        (["--config", "tiny", "--only", "trl", "--json", "{other}"], "that holds no measurements of `train`"),
    ],
)
def test_what_the_user_can_mend_is_an_error(tmp_path: Path, arguments: list[str], said: str) -> None:
    places = {"recipe": ROOT / "recipes" / "janus-7b" / "sft" / "full.yaml", "other": tmp_path / "other.json"}
    places["other"].write_text('{"command": "data"}', encoding="utf-8")
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert places["other"].read_text(encoding="utf-8") == '{"command": "data"}'
