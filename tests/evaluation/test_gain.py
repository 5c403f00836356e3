"""scripts/evaluate.py gain: figures equal a float64 loop over the models, and unusable input is one error."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.data.chat.template import use_template
from train.evaluation.gain_rows import count_bars
from train.reporting.markdown import replace_section
from train.sft import main

ROOT = Path(__file__).parents[2]
SYSTEMS = ("Be a river.", "Be a stone.", "Be a paper window.")


@pytest.fixture
def refused(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str | Path) -> str:
        assert command("gain", *arguments) == 2
        *usage, error = capsys.readouterr().err.splitlines()
        assert not usage or usage[0].startswith("usage: ")
        return error.removeprefix("error: ") if error.startswith("error: ") else ""

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four instructions with three siblings each, in Janus's columns, and a row without a system message."""
    rows = [
        {
            "main_source": "a" if question < 1 else "b",
            "preference_set": [{"dimension": "style", "subdimension": ("tone", "format")[number % 2]}],
            "system": system,
            "prompt": f"question {question}",
            "output": f"answer {system} {question}",
        }
        for question in range(4)
        for number, system in enumerate(SYSTEMS)
    ]
    path = tmp_path / "siblings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0] | {"system": ""}]), encoding="utf-8")
    return path


@pytest.fixture
def after(tiny_model: Path, tmp_path: Path) -> Path:
    """Other weights than the tiny model's, and a usable template."""
    folder = tmp_path / "after"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({name: value * 1.1 for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    use_template(tokenizer, "chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.save_pretrained(folder)
    return folder


def gain_by_hand(folder: Path, rows: list[dict]) -> tuple[list[float], list[float]]:
    """Gains over both siblings' messages and over none: row by row, in float64, with the text written out here."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).double()

    def likelihood(system: str | None, row: dict) -> tuple[float, int]:
        turn = lambda role, text: f"<|im_start|>{role}\n{text}"  # noqa: E731
        prompt = f"{turn('system', system)}<|im_end|>\n" if system else ""
        prompt += f"{turn('user', row['prompt'])}<|im_end|>\n{turn('assistant', '')}"
        before, answer = (tokenizer(text)["input_ids"] for text in (prompt, row["output"] + "<|im_end|>"))
        with torch.no_grad():
            scores = model(torch.tensor([before + answer])).logits[0].log_softmax(-1).tolist()
        return math.fsum(scores[len(before) + place - 1][token] for place, token in enumerate(answer)), len(answer)

    over_others, over_none = [], []
    for row in rows:
        own, tokens = likelihood(row["system"], row)
        others = [likelihood(system, row)[0] for system in SYSTEMS if system != row["system"]]
        over_others.append(statistics.fmean((own - other) / tokens for other in others))
        over_none.append((own - likelihood(None, row)[0]) / tokens)
    return over_others, over_none


def test_figures_are_those_of_the_models(
    command: Callable[..., int], data: Path, after: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (after / "report.md").write_text("# a run\n\n## System gain\n\nold\n\n## Later\n\nstays\n", encoding="utf-8")
    assert command("gain", "--model", after, "--before", tiny_model, "--data", data) == 0
    shown = capsys.readouterr().out
    assert f"skipped 1 row: no system message (first: {data}:13)" in shown
    record = json.loads((after / "gain.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()][:12]
    means = {}
    for name, folder in ("before", tiny_model), ("after", after):
        over_others, over_none = gain_by_hand(folder, rows)
        result = record["models"][name]
        assert result["overall"]["gain"]["mean"] == pytest.approx(statistics.fmean(over_others), abs=1e-5)
        assert result["overall"]["gain_over_none"]["mean"] == pytest.approx(statistics.fmean(over_none), abs=1e-5)
        assert result["rows_with_siblings"] == result["overall"]["rows"] == 12
        assert result["overall"]["instructions"] == 4
        groups = {(group["of"], group["is"]): group for group in result["groups"]}
        assert {label: group["rows"] for label, group in groups.items()} == {
            ("main_source", "a"): 3,
            ("main_source", "b"): 9,
            ("style", "tone"): 8,
            ("style", "format"): 4,
        }
        assert groups["main_source", "b"]["gain"]["mean"] == pytest.approx(statistics.fmean(over_others[3:]), abs=1e-5)
        assert groups["main_source", "a"]["gain"]["low"] is None
        means[name] = statistics.fmean(over_others)
    assert record["change"][0]["gain"]["mean"] == pytest.approx(means["after"] - means["before"], abs=1e-5)
    assert abs(means["after"] - means["before"]) > 1e-3
    assert (after / "gain.png").read_bytes().startswith(b"\x89PNG")
    report = (after / "report.md").read_text(encoding="utf-8")
    assert report.startswith("# a run\n\n## System gain\n\nReference answers of ")
    assert report.endswith("\n\n## Later\n\nstays\n")
    assert f"{means['after']:+.3f} (n = 4) p=" in report


def test_rows_that_ignore_their_message_are_named_and_left_out_of_training(
    command: Callable[..., int],
    data: Path,
    after: Path,
    tiny_model: Path,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With random weights some answers are likelier under another message than under their own."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()][:12]
    before, gains = gain_by_hand(tiny_model, rows)[0], gain_by_hand(after, rows)[0]
    ignoring = sorted((number for number in range(12) if gains[number] <= 0), key=lambda number: gains[number])
    assert 0 < len(ignoring) < 12
    assert command("gain", "--model", after, "--before", tiny_model, "--data", data) == 0
    assert "ignore their message" not in capsys.readouterr().out
    assert command("gain", "--model", after, "--before", tiny_model, "--data", data, "--rows") == 0

    shown = capsys.readouterr().out
    report = (after / "report.md").read_text(encoding="utf-8")
    listed = report.partition("### Rows that ignore their message\n")[2]
    assert listed.removesuffix("\n![histogram](gain_histogram.png)\n") in shown
    assert (after / "gain_histogram.png").read_bytes().startswith(b"\x89PNG")
    assert f"{len(ignoring)} of 12 rows ({len(ignoring) / 12:.1%}) have a gain of 0 or less with `after`" in listed
    of_label = {"all rows": range(12), "main_source: a": range(3), "main_source: b": range(3, 12)}
    for label, numbers in of_label.items():
        counts = (sum(of_model[number] <= 0 for number in numbers) for of_model in (before, gains))
        cells = " | ".join(f"{count} ({count / len(numbers):.1%})" for count in counts)
        assert f"| {label} | {len(numbers)} | {cells} |" in listed
    lines = [line for line in listed.splitlines() if line.startswith(f"- {data}:")]
    assert lines == [f"- {data}:{number + 1}: gain {gains[number]:+.3f} nats per token" for number in ignoring]
    worst = rows[ignoring[0]]
    assert f"  - system: `{worst['system']}`\n  - user: `{worst['prompt']}`\n  - answer: `{worst['output']}`" in listed

    recipe = recipe_file(
        data={"sources": [{"path": str(data), "min_gain": str(after / "gain_rows.jsonl")}]},
        training={"max_steps": 1, "num_train_epochs": ...},
    )
    assert main(["--recipe", str(recipe), "--check", "--json", str(tmp_path / "check.json")]) == 0
    check = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    (dropped,) = check["outcomes"]
    assert (dropped["outcome"], dropped["rows"], check["training"]["rows"]) == (
        *("left out", len(ignoring)),
        13 - len(ignoring),
    )
    assert [row["place"] for row in dropped["examples"]] == [f"{data}:{n + 1}" for n in sorted(ignoring)[:3]]


def test_ignored_keys_are_no_part_of_the_rows(command: Callable[..., int], after: Path, tmp_path: Path) -> None:
    """Their digests are those of the rows that a recipe reads with the same `ignore`."""
    texts = [("system", system, "user", "river?", "assistant", f"stone {system}") for system in SYSTEMS]
    path = tmp_path / "notes.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for text in texts:
            turns = [{"role": role, "content": content} for role, content in zip(text[::2], text[1::2], strict=True)]
            turns[-1]["thinking"] = "a long thought about stones"
            lines.write(json.dumps({"messages": turns}) + "\n")
    assert command("gain", "--model", after, "--data", path, "--ignore", "messages[].thinking") == 0
    records = [json.loads(line) for line in (after / "gain_rows.jsonl").read_text(encoding="utf-8").splitlines()]
    digests = [xxhash.xxh3_128("\0".join(text).encode()).hexdigest() for text in texts]
    assert [record["conversation"] for record in records] == digests


def test_the_answer_that_is_measured_is_quoted(
    command: Callable[..., int], after: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number, system in enumerate(SYSTEMS):
            texts = [("system", system), ("user", "river?"), ("assistant", f"stone {number}")]
            texts += [("user", "and?"), ("assistant", "not trained")]
            turns: list[dict[str, object]] = [{"role": role, "content": content} for role, content in texts]
            turns[-1]["weight"] = 0
            lines.write(json.dumps({"messages": turns}) + "\n")
    assert command("gain", "--model", after, "--data", path, "--rows") == 0
    listed = capsys.readouterr().out
    assert "  - user: `river?`\n  - answer: `stone " in listed
    assert "not trained" not in listed


@pytest.mark.parametrize("scale", [0.01, 1.0, 300.0])
def test_each_row_is_in_one_bar_of_the_histogram_and_none_spans_0(scale: float) -> None:
    rng = np.random.default_rng(0)
    models = [np.append(rng.normal(size=500), [0.0, -0.0, 31.7]) * scale, rng.normal(2, 1, 300) * scale]
    width, bars = count_bars(models)
    for values, counts in zip(models, bars, strict=True):
        for bar in range(min(counts), max(counts) + 1):
            inside = [value for value in values.tolist() if (bar - 1) * width < value <= bar * width]
            assert counts[bar] == len(inside)
        assert sum(count for bar, count in counts.items() if bar <= 0) == sum(value <= 0 for value in values)
    low, high = np.quantile(np.concatenate(models), [0.01, 0.99])
    assert 15 <= (high - low) / width <= 40


def test_equal_gains_have_a_histogram() -> None:
    assert count_bars([np.zeros(3)])[1] == [{0: 3}]


def test_json_writes_nothing_into_the_models_folders(
    command: Callable[..., int], data: Path, after: Path, tmp_path: Path
) -> None:
    before = sorted(path.name for path in after.iterdir())
    (tmp_path / "out").mkdir()
    command_line = ["--model", after, "--data", data, "--json", tmp_path / "out" / "of.json", "--limit", "5"]
    assert command("gain", *command_line, "--group", "prompt", "--others", "1") == 0
    assert sorted(path.name for path in after.iterdir()) == before
    written = [".gain.lock", "gain.png", "gain_scores.jsonl", "of.json", "of_rows.jsonl"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    record = json.loads((tmp_path / "out" / "of.json").read_text(encoding="utf-8"))
    assert record["models"]["after"]["overall"]["rows"] == 5
    assert "change" not in record
    assert {group["of"] for group in record["models"]["after"]["groups"]} >= {"prompt"}


def test_unmeasurable_models_or_data_are_an_error(
    refused: Callable[..., str], data: Path, after: Path, tiny_model: Path, smollm2: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "plain.jsonl"
    rows.write_text(json.dumps({"prompt": "river?", "output": "stone"}) + "\n", encoding="utf-8")
    good = ["--model", after, "--data", data]
    assert refused("--model", "nowhere", "--data", data).startswith("--model nowhere: there is no such folder")
    assert refused("--model", tmp_path, "--data", data).startswith(
        f"--model {tmp_path}: cannot be loaded: there is no "
    )
    assert refused("--model", after, "--data", rows).startswith(f"--data {rows}: no row can be measured (1: no system")
    assert "no.jsonl" in refused("--model", after, "--data", tmp_path / "no.jsonl")
    assert refused(*good, "--before", smollm2).startswith(
        f"--before {smollm2}: its vocabulary differs from that of {after}"
    )
    assert refused(*good, "--group", "subject") == "--group subject: no row has text in a column of that name"
    assert refused(*good, "--json", tmp_path / "no" / "gain.json").startswith("--json ")
    os.mkfifo(tmp_path / "pipe")  # what is no file isn't replaced by one
    assert refused(*good, "--json", tmp_path / "pipe").endswith("must be a file in an existing folder")
    assert refused(*good, "--others", "0") == "argument --others: '0' must be an integer >= 1"
    assert refused(*good, "--template", "chatm").startswith("--template: there is no template 'chatm'")
    assert "loses system messages" in refused("--model", tiny_model, "--data", data, "--template", _deaf(tmp_path))
    assert not (after / "gain.json").exists()


def _deaf(folder: Path) -> Path:
    """A template that leaves system messages out."""
    path = folder / "deaf.jinja"
    path.write_text(
        "{% for message in messages %}{% if message.role != 'system' %}<|im_start|>{{ message.role }}\n"
        "{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    return path


def test_a_section_of_the_report_is_replaced_in_place(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    replace_section(report, "## B", "## B\n\nfirst\n")
    assert report.read_text() == "## B\n\nfirst\n"
    report.write_text("# run\n\ntext\n\n## A\n\na\n### sub\n\n## B\n\nold\n\n### of B\n\n## C\n\nc\n")
    replace_section(report, "## B", "## B\n\nnew\n")
    assert report.read_text() == "# run\n\ntext\n\n## A\n\na\n### sub\n\n## B\n\nnew\n\n## C\n\nc\n"
    replace_section(report, "## D", "## D\n\nd\n")
    assert report.read_text().endswith("## C\n\nc\n\n## D\n\nd\n")


KILLED = """
import os, signal, sys
from train.system_gain.score_cache import ScoreCache
whole, left = ScoreCache.add, int(sys.argv.pop(1))
def until_killed(*arguments):
    global left
    whole(*arguments)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
ScoreCache.add = until_killed
import runpy
runpy.run_path("scripts/evaluate.py", run_name="__main__")
"""


def test_a_killed_run_continues_from_its_scores(
    command: Callable[..., int], after: Path, data: Path, tmp_path: Path
) -> None:
    """Killed after two batches of five or more; the figures equal those of an uninterrupted run."""
    arguments = ["gain", "--model", after, "--data", data, "--batch-tokens", "200"]
    killed = [sys.executable, "-c", KILLED, "2", *map(str, arguments)]
    assert subprocess.run(killed, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGKILL
    scores = after / "gain_scores.jsonl"
    kept = [line for line in scores.read_text(encoding="utf-8").splitlines() if line]
    assert kept
    with scores.open("a", encoding="utf-8") as lines:
        lines.write(kept[0][: len(kept[0]) // 2])  # as a crash leaves it
    assert command(*arguments) == 0
    every = [json.loads(line) for line in scores.read_text(encoding="utf-8").splitlines() if line.endswith("]")]
    assert len(every) == len({key for key, _ in every}) > len(kept)
    assert [json.dumps(line) for line in every[: len(kept)]] == kept
    alone = tmp_path / "alone.json"
    assert command(*arguments, "--json", alone) == 0
    result, expected = (json.loads(path.read_text(encoding="utf-8")) for path in (after / "gain.json", alone))
    assert [model["overall"]["gain"]["mean"] for model in result["models"].values()] == pytest.approx(
        [model["overall"]["gain"]["mean"] for model in expected["models"].values()], abs=1e-6
    )


@pytest.mark.parametrize("rubbish", [b"\xff\xfe\n", b"5\n", b'["a"]\n', b"{}\n", b"\x00\x00\n"])
def test_a_broken_line_among_the_scores_is_skipped(
    command: Callable[..., int], after: Path, data: Path, rubbish: bytes
) -> None:
    """A full disk or a power failure may leave such a line."""
    assert command("gain", "--model", after, "--data", data) == 0
    scores = after / "gain_scores.jsonl"
    kept = scores.read_bytes()
    result = (after / "gain.json").read_bytes()
    scores.write_bytes(rubbish + kept)
    assert command("gain", "--model", after, "--data", data) == 0
    assert (after / "gain.json").read_bytes() == result
    assert scores.read_bytes().strip() == (rubbish + kept).strip()  # nothing was scored again


def test_an_adapter_is_measured_on_its_base(
    command: Callable[..., int], data: Path, after: Path, tmp_path: Path
) -> None:
    """An adapter, and the same merged into the weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(after), LoraConfig(r=4, target_modules="all-linear"))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05)
    tokenizer = AutoTokenizer.from_pretrained(after)
    for folder, saved in (tmp_path / "adapter", model), (tmp_path / "merged", None):
        if saved is None:
            saved = model.merge_and_unload()
        saved.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert command("gain", "--model", folder, "--data", data) == 0
    adapter, merged = (json.loads((tmp_path / name / "gain.json").read_text()) for name in ("adapter", "merged"))
    [of_adapter], [of_merged] = adapter["models"].values(), merged["models"].values()
    assert of_adapter["overall"]["gain"]["mean"] == pytest.approx(of_merged["overall"]["gain"]["mean"], abs=1e-4)
    assert command("gain", "--model", after, "--data", data) == 0
    [of_base] = json.loads((after / "gain.json").read_text())["models"].values()
    assert abs(of_base["overall"]["gain"]["mean"] - of_merged["overall"]["gain"]["mean"]) > 0.01
