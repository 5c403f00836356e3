"""System gain in the evaluations of a run: logged, reported, and the metric of the best checkpoint."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from small_runs import EVALUATED_AT_EACH_STEP
from transformers import AutoModelForCausalLM, AutoTokenizer

from train import progress
from train.data.chat.template import use_template
from train.data.tokens.workers import RowTokenizer
from train.recipe import Source
from train.sft import main
from train.system_gain.metric import system_gain
from train.system_gain.variants import make_variants, read_labelled_conversations

TRAINING = {
    **EVALUATED_AT_EACH_STEP,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_system_gain",
    "bf16": False,
}


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Write three instructions under three messages each, and four single rows, two of them without a message."""
    path = tmp_path / "held_out.jsonl"
    systems = ["Speak like a river.", "Speak like a stone.", "Be a paper window."]
    rows = [(systems[row % 3], f"question {row // 3}", f"{systems[row % 3][-7:]} river {row}") for row in range(9)]
    rows += [("Be brief.", "alone", "stone"), ("Be long.", "alone too", "window " * 9)]
    rows += [("", "nothing", "paper"), ("", "nothing more", "paper")]
    rows += [("Be loud.", "by itself", "cloud"), ("Be slow.", "by itself too", "amber")]
    with path.open("w", encoding="utf-8") as lines:
        for row, (system, user, answer) in enumerate(rows):
            turns = [("system", system), ("user", user), ("assistant", answer)]
            messages = [{"role": role, "content": text} for role, text in turns if text]
            lines.write(json.dumps({"messages": messages, "source": f"s{row % 2}"}) + "\n")
    return path


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_each_evaluation_measures_the_gain_and_the_best_checkpoint_has_the_highest(
    recipe_file: Callable[..., Path], held_out: Path, tmp_path: Path, tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)  # as if each batch took long
    recipe = recipe_file(
        data={"validation": [{"path": str(held_out)}]},
        training=TRAINING,
        system_gain={"rows": 12},
        seed=5,
    )
    assert main(["--recipe", str(recipe)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("system gain: ")]
    # Twelve rows, each under its own message, one or two others, and none; at its end all of them are scored.
    ends = [line for line in lines if " (100%), " in line]
    assert len(ends) == 4
    [of] = {re.fullmatch(r"system gain: (\d+) of (\d+) answers \(100%\), 0s left", line).groups() for line in ends}
    assert of[0] == of[1]
    assert 36 <= int(of[0]) <= 48
    run = tmp_path / "run"
    lines = {line["step"]: line for line in metrics_of(run) if "eval_loss" in line}
    assert sorted(lines) == [0, 1, 2, 3]
    gains = {step: line["eval_system_gain"] for step, line in lines.items()}
    best = max(gains, key=lambda step: gains[step] if step else -9)
    [loaded] = [line["loaded_step"] for line in metrics_of(run) if "loaded_step" in line]
    assert loaded == best

    def measured(folder: Path) -> object:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        use_template(tokenizer, "chatml")
        rows = read_labelled_conversations([Source(path=str(held_out))])
        variant_rows = make_variants(rows, RowTokenizer(tokenizer, "assistant"), limit=12, seed=5)
        return system_gain(AutoModelForCausalLM.from_pretrained(folder), variant_rows.rows, seed=5)

    for step, folder in ((0, tiny_model), (1, run / "checkpoint-1"), (best, run)):
        expected = measured(folder)
        for name, value in expected.metrics().items():
            assert lines[step][name] == pytest.approx(value, abs=1e-5), name
    records = [json.loads(line) for line in (run / "system_gain.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    assert {group["is"] for group in records[best]["groups"]} == {"s0", "s1"}

    report = (run / "report.md").read_text(encoding="utf-8")
    first, last = lines[0], lines[best]
    assert (
        f"| system gain in nats per token, after step 0 and {best} | "
        f"{first['eval_system_gain']:.3f} [{first['eval_system_gain_low']:.3f}, {first['eval_system_gain_high']:.3f}] -> "
        f"{last['eval_system_gain']:.3f} [{last['eval_system_gain_low']:.3f}, {last['eval_system_gain_high']:.3f}] |"
    ) in report
    assert "![system gain](system_gain.png)" in report
    assert (run / "system_gain.png").read_bytes().startswith(b"\x89PNG")
    assert "measured at each evaluation on 12 validation rows, against other messages" in " ".join(report.split())


def test_the_file_has_the_lines_of_the_resumed_run(
    recipe_file: Callable[..., Path], held_out: Path, tmp_path: Path
) -> None:
    """Steps after the checkpoint that a run resumes from are there once; another run's are not."""
    run = tmp_path / "run"
    training = TRAINING | {"max_steps": 5, "save_steps": 2, "load_best_model_at_end": ..., "metric_for_best_model": ...}
    arguments = ["--recipe", str(recipe_file(data={"validation": [{"path": str(held_out)}]}, training=training))]

    def measured() -> tuple[list[int], list[float]]:
        lines = [json.loads(line) for line in (run / "system_gain.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line["step"] for line in lines], [line["overall"]["gain"]["mean"] for line in lines]

    assert main(arguments) == 0
    steps, gains = measured()
    assert steps == [0, 1, 2, 3, 4, 5]
    assert main([*arguments, "--resume", str(run / "checkpoint-2")]) == 0
    assert measured() == (steps, pytest.approx(gains))
    assert [line["step"] for line in metrics_of(run) if "eval_loss" in line] == steps  # that of the start just once
    later = ["--resume", "never", "training.eval_on_start=false", "training.eval_steps=2", "seed=3"]
    assert main([*arguments, *later]) == 0
    assert measured()[0] == [line["step"] for line in metrics_of(run) if "eval_loss" in line]
    assert 0 not in measured()[0]


def test_a_share_of_the_sources_is_measured_on_the_rows_that_were_held_out(
    recipe_file: Callable[..., Path], held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All siblings of an instruction are held out together, so their messages are those of siblings."""
    from train.data.prepare import prepare
    from train.model.tokenizer import load_tokenizer
    from train.recipe import load_recipe
    from train.system_gain.validation_rows import load_gain_rows

    recipe = load_recipe(recipe_file(data={"sources": [{"path": str(held_out)}], "validation": 0.5}))
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, "chatml")
    data = prepare(recipe, tokenizer)
    held = {
        place for sequence in range(len(data.validation.dataset)) for place in data.validation.dataset.places(sequence)
    }
    for _ in range(2):  # the second time from the cache
        variant_rows = load_gain_rows(recipe, data, tokenizer)
        assert {row.place for row in variant_rows.rows} <= held
        assert len(variant_rows.rows) + variant_rows.dropped.total() == len(held)
        assert sum(row.siblings for row in variant_rows.rows) >= 3
        for row in variant_rows.rows:
            assert row.siblings == (row.place.rpartition(":")[2] in "123456789")
    held_out.write_text("", encoding="utf-8")  # the sources aren't read again
    assert [row.place for row in load_gain_rows(recipe, data, tokenizer).rows] == [
        row.place for row in variant_rows.rows
    ]


def test_a_run_says_why_the_gain_can_not_be_measured(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deaf = tmp_path / "deaf.jsonl"
    turns = [{"role": "user", "content": "river"}, {"role": "assistant", "content": "stone"}]
    deaf.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    data = {"validation": [{"path": str(deaf)}]}
    arguments = str(recipe_file(data=data, training=TRAINING))
    for check in ([], ["--check"]):
        assert (
            "training.metric_for_best_model: eval_system_gain can't be measured: no system message (1 row)"
            in refused("--recipe", arguments, *check)
        )
    assert "system_gain.rows is 0" in refused("--recipe", arguments, "system_gain.rows=0")
    capsys.readouterr()
    by_loss = [*("--recipe", arguments), "training.metric_for_best_model=eval_loss", "training.max_steps=1"]
    assert main(by_loss) == 0
    assert "not measured: no system message (1 row)" in capsys.readouterr().out
    assert not any("system" in key for line in metrics_of(tmp_path / "run") for key in line)
