"""--check: what it reports, when it says ready, and that it needs no weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trl import SFTConfig

from train.data.chat_template import use_template
from train.data.prepare import examine
from train.loop.trainer import optimizer_steps, sequences_per_step
from train.model.load import load_tokenizer
from train.preflight import marked, marks_for, page, shortened, visible
from train.preflight_report import Piece, Report, pieces, schedule, survey
from train.recipe import load_recipe
from train.sft import main

ROOT = Path(__file__).parents[1]


def report_of(path: Path, probe_lines: tuple[str, ...] = ()) -> Report:
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe.model)
    template = use_template(tokenizer, recipe.chat.template)
    return survey(recipe, tokenizer, examine(recipe, tokenizer), template, probe_lines)


def texts_of(rows_file: Path) -> dict[str, tuple[str, str]]:
    """Place -> the row's text in ChatML, and the part of it that is trained; written without a template."""
    texts = {}
    for number, line in enumerate(rows_file.read_text(encoding="utf-8").splitlines(), 1):
        messages = json.loads(line)["messages"]
        text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
        texts[f"{rows_file}:{number}"] = text, f"{messages[-1]['content']}<|im_end|>"
    return texts


def test_a_check_needs_no_weights_and_writes_its_json(
    recipe_file: Callable[..., Path],
    tiny_model: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    recipe = recipe_file(model={"name_or_path": str(folder)}, data={"validation": 0.25})
    assert main(["--recipe", str(recipe), "--check", "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\nready\n")
    assert not (tmp_path / "run").exists()
    found = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert found.keys() == {
        *("ready", "error", "warnings", "model", "dtype", "template", "probe", "max_length", "packing", "training"),
        *("validation", "outcomes", "overlap", "schedule", "output_dir", "resumes_from", "plan", "examples"),
    }
    part = {
        *("rows", "tokens", "trained_tokens", "rows_with_system_message", "distinct_system_messages", "lengths"),
        *("histogram", "longest_tokens", "longest_place", "sequences", "filling", "documents_per_sequence_mean"),
        *("documents_per_sequence_max", "duplicates"),
    }
    assert found["training"].keys() == found["validation"].keys() == part
    assert (found["ready"], found["error"]) == (True, None)
    assert found["probe"]
    assert all(sentence in shown for sentence in found["probe"])
    assert found["training"]["rows"] + found["validation"]["rows"] == len(rows_file.read_text().splitlines())
    training = found["training"]
    assert training["filling"] == pytest.approx(training["tokens"] / (training["sequences"] * 512))
    assert training["documents_per_sequence_mean"] == pytest.approx(training["rows"] / training["sequences"])
    assert sum(bar["rows"] for bar in training["histogram"]) == training["rows"]
    assert found["schedule"]["steps"] == -(-training["sequences"] // 2)
    texts = texts_of(rows_file)
    assert len(found["examples"]) == 5
    assert {example["system_message"] for example in found["examples"]} == {True, False}
    for example in found["examples"]:
        text, trained = texts[example["place"]]
        assert "".join(piece["text"] for piece in example["pieces"]) == text
        assert "".join(piece["text"] for piece in example["pieces"] if piece["trained"]) == trained
        assert ("<|im_start|>system" in text) is example["system_message"]


def test_the_page_marks_what_is_trained_in_plain_text_and_in_colour(
    recipe_file: Callable[..., Path], rows_file: Path
) -> None:
    report = report_of(recipe_file(), ("the template renders system messages as a turn",))
    plain = page(report, [], coloured=False).plain
    coloured = page(report, ["<|im_start|>", "<|im_end|>"], coloured=True)
    assert "the template renders system messages as a turn" in plain
    green = [coloured.plain[span.start : span.end] for span in coloured.spans if span.style == "bold green"]
    texts = texts_of(rows_file)
    for example in report.examples:
        text, trained = texts[example.place]
        mark = marked(example.pieces, ("⟦", "⟧"))
        assert mark == text.removesuffix(f"{trained}\n") + f"⟦{trained}⟧\n"
        assert mark.replace("⟦", "").replace("⟧", "") == text
        room = max(80, 1_200 // len(example.pieces))
        assert f"⟦{shortened(trained, room)}⟧" in plain
        assert shortened(trained, room) in green
    assert "⟦" not in coloured.plain


def test_marks_are_some_that_the_rows_do_not_hold() -> None:
    assert marks_for([Piece("plain", True)]) == ("⟦", "⟧")
    assert marks_for([Piece("a ⟧ here", False)]) == ("⟪", "⟫")


def test_only_the_middle_of_a_long_text_is_left_out() -> None:
    text = "".join(f"{number:05d}" for number in range(1_000))
    assert shortened(text, 200) == f"{text[:100]} [... 4,800 characters ...] {text[-100:]}"
    assert shortened(text[:230], 200) == text[:230]


def test_a_row_does_not_drive_the_terminal() -> None:
    assert visible("a\x1b[31mb\r\n\tc\x9b") == "a␛[31mb␍\n\tc␦"


def test_pieces_of_a_sentencepiece_row_are_its_text(mistral_tokenizer_v1: Callable[[], object]) -> None:
    """Decoded alone, each piece would lose the blank that it begins with."""
    tokenizer = mistral_tokenizer_v1()
    ids = tokenizer("one two three four", add_special_tokens=False).input_ids
    found = pieces(tokenizer, ids, [-100, ids[1], -100, *ids[3:]])
    assert [piece.trained for piece in found] == [False, True, False, True]
    assert "".join(piece.text for piece in found) == "one two three four"


SCHEDULES = [
    {},
    {"num_train_epochs": 2.5, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
    {"max_steps": 7, "warmup_steps": 0.3},
    {"num_train_epochs": 1, "warmup_steps": 5, "per_device_train_batch_size": 64},
]


@pytest.mark.parametrize("training", SCHEDULES)
@pytest.mark.parametrize("sequences", [1, 24, 101])
def test_the_schedule_is_that_of_sft_config(training: dict, sequences: int, tmp_path: Path) -> None:
    arguments = SFTConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[], **training)
    found = schedule(training, sequences, 10.0, arguments.world_size)
    assert found.steps == optimizer_steps(range(sequences), arguments)
    assert found.sequences_per_step == sequences_per_step(arguments)
    assert found.warmup_steps == arguments.get_warmup_steps(found.steps)
    assert found.saving.steps == arguments.save_steps


def test_more_processes_take_fewer_steps() -> None:
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3}
    found = schedule({**training, "eval_strategy": "steps", "eval_steps": 0.1}, 1_000, 500.0, 8)
    assert (found.sequences_per_step, found.steps_per_epoch, found.steps) == (64, 16, 48)  # 62.5 batches of 16 rows
    assert found.tokens_per_step == 32_000
    assert found.evaluation.steps == 5


def test_the_check_loads_no_trl_and_starts_no_process_group(recipe_file: Callable[..., Path]) -> None:
    code = (
        "import sys; from train.sft import main; import torch; "
        f"assert main(['--recipe', {str(recipe_file())!r}, '--check']) == 0; "
        "assert 'trl' not in sys.modules and not torch.distributed.is_initialized()"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_bad_rows_give_the_page_and_then_one_error_with_2(
    recipe_file: Callable[..., Path], rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rows_file.read_text().splitlines()
    lines[2] = "{no json"
    rows_file.write_text("\n".join(lines))
    recipe, report = str(recipe_file(data={"max_length": 100})), tmp_path / "report.json"
    assert main(["--recipe", recipe, "--check", "--json", str(report)]) == 2
    shown = capsys.readouterr()
    assert shown.out.endswith("\nnot ready\n")
    assert shown.err.startswith("error: data: ")
    assert shown.err.count("\n") == 1
    assert "invalid JSON" in shown.err
    assert "more tokens than data.max_length (100)" in shown.err
    found = json.loads(report.read_text(encoding="utf-8"))
    assert (found["ready"], f"error: {found['error']}\n") == (False, shown.err)
    assert {outcome["outcome"] for outcome in found["outcomes"]} == {"refused"}

    mended = recipe_file(data={"max_length": 100, "overlong": "drop", "on_bad_row": "skip"})
    assert main(["--recipe", str(mended), "--check"]) == 0
    shown = capsys.readouterr().out
    assert f"1 row left out, invalid JSON: first {rows_file}:3" in shown
    assert "dropped, training, over 100 tokens" in shown


def test_no_row_left_still_gives_a_page(recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(recipe_file(data={"max_length": 8, "overlong": "drop"})), "--check"]) == 2
    shown = capsys.readouterr()
    assert "no training row is left" in shown.err
    assert "0 rows" in shown.out


def test_an_older_report_does_not_pass_for_this_one(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text('{"ready": true}')
    recipe = str(recipe_file(chat={"template": "no-such"}))
    assert main(["--recipe", recipe, "--check", "--json", str(report)]) == 2
    assert not report.exists()


def test_json_that_cannot_be_written_is_the_users_to_mend(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", str(recipe_file()), "--check", "--json", str(tmp_path / "no" / "report.json")]) == 2
    assert "error: --json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as usage:
        main(["--recipe", str(recipe_file()), "--json", "x.json"])
    assert usage.value.code == 2


def test_other_ranks_leave_the_check_to_the_first(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["--recipe", str(recipe_file()), "--check"]) == 0
    assert capsys.readouterr().out == ""


def test_duplicates_and_overlap_are_warnings(recipe_file: Callable[..., Path], rows_file: Path, tmp_path: Path) -> None:
    lines = rows_file.read_text().splitlines()
    rows_file.write_text("\n".join([*lines, lines[0]]))
    held = tmp_path / "held.jsonl"
    other = json.loads(lines[2])
    other["messages"][-1]["content"] = "another answer"
    held.write_text("\n".join([lines[1], json.dumps(other)]))
    report = report_of(recipe_file(data={"validation": [{"path": str(held)}]}))
    assert report.ready
    assert report.training.duplicates.rows == 1
    assert report.training.duplicates.example == (f"{rows_file}:1", f"{rows_file}:25")
    assert (report.overlap.conversations.rows, report.overlap.questions.rows) == (1, 2)
    assert report.overlap.conversations.example == (f"{rows_file}:2", f"{held}:1")
    assert len(report.warnings) == 3
    assert all(warning in page(report, [], coloured=False).plain for warning in report.warnings)


def test_a_schedule_that_is_all_warm_up_is_a_warning(recipe_file: Callable[..., Path]) -> None:
    report = report_of(recipe_file(training={"warmup_steps": 1_000}))
    assert any("warm-up" in warning for warning in report.warnings)
