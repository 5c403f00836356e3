"""--check: its report, its verdict, and that it needs no weights."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_output import broken_stdout, everywhere
from rich.cells import cell_len
from safetensors.torch import save_file
from trl import SFTConfig

from train.data.prepare import examine
from train.errors import UserError
from train.formatting import shorten, visible
from train.loop.output_dir import claim_output_dir
from train.model.tokenizer import load_chat_tokenizer
from train.preflight.page import marked, marks_for, page
from train.preflight.report import Piece, Report, build_report, split_pieces
from train.recipe import load_recipe
from train.recipe.schedule import compute_schedule
from train.sft import main

ROOT = Path(__file__).parents[2]
WIDE = 10_000
"""Columns in which no line of a page has to be wrapped."""


@pytest.fixture(autouse=True)
def wide_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the output wide enough that no line is wrapped."""
    monkeypatch.setenv("COLUMNS", str(WIDE))


def report_of(path: Path) -> Report:
    recipe = load_recipe(path)
    chat = load_chat_tokenizer(recipe.model, recipe.chat)
    return build_report(recipe, chat, examine(recipe, chat.tokenizer))


def page_of(path: Path) -> str:
    return page(report_of(path), [], coloured=False, width=WIDE).plain


def rows_of(path: Path, *conversations: list[str]) -> Path:
    """Write a file of conversations, each a list of texts of "system: ..." and so on."""
    turns = [[text.partition(": ") for text in texts] for texts in conversations]
    rows = [{"messages": [{"role": role, "content": text} for role, _, text in row]} for row in turns]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts_of(rows_file: Path) -> dict[str, tuple[str, str]]:
    """Return place -> the row's text in ChatML and its trained part, written without a template."""
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
    folder = tmp_path / "useless-weights"  # of another model: loading them would fail
    shutil.copytree(tiny_model, folder)
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    recipe = recipe_file(
        model={"name_or_path": str(folder)}, data={"validation": 0.25, "cache_dir": str(tmp_path / "cache")}
    )
    assert main(["--recipe", str(recipe), "--check", "--json", str(tmp_path / "report.json")]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\nready\n")
    assert not (tmp_path / "run").exists()
    main(["--recipe", str(recipe), "--check"])
    assert "..., found; tokens by" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report.keys() == {
        *("ready", "error", "warnings", "model", "dtype", "template", "probe", "max_length", "packing", "training"),
        *("chat", "system_messages", "caches", "float8", "system_gain", "samples", "unread", "loss_weights"),
        *("validation", "outcomes", "overlap", "schedule", "output_dir", "resumes_from", "plan", "examples"),
        "finished",
    }
    part = {
        *("rows", "tokens", "trained_tokens", "rows_with_system_message", "distinct_system_messages", "lengths"),
        *("histogram", "longest_tokens", "longest_place", "sequences", "filling", "documents_per_sequence_mean"),
        *("documents_per_sequence_max", "duplicates", "conversations", "rows_of_conversations"),
        *("rows_with_default_system", "rows_with_loss_weight"),
    }
    assert report["training"].keys() == report["validation"].keys() == part
    assert (report["ready"], report["error"]) == (True, None)
    assert report["probe"] == []  # chatml is used as it is
    assert report["system_messages"]
    assert all(sentence in shown for sentence in report["system_messages"])
    (cache,) = report["caches"]
    assert f"cache       {rows_file}: {cache['key'][:8]}..., made now; tokens by {cache['how']}\n" in shown
    assert report["training"]["rows"] + report["validation"]["rows"] == len(rows_file.read_text().splitlines())
    training = report["training"]
    assert training["filling"] == pytest.approx(training["tokens"] / (training["sequences"] * 512))
    assert training["documents_per_sequence_mean"] == pytest.approx(training["rows"] / training["sequences"])
    assert sum(bar["rows"] for bar in training["histogram"]) == training["rows"]
    assert report["schedule"]["steps"] == -(-training["sequences"] // 2)
    texts = texts_of(rows_file)
    assert len(report["examples"]) == 5
    assert {example["system_message"] for example in report["examples"]} == {True, False}
    for example in report["examples"]:
        text, trained = texts[example["place"]]
        assert "".join(piece["text"] for piece in example["pieces"]) == text
        assert "".join(piece["text"] for piece in example["pieces"] if piece["trained"]) == trained
        assert ("<|im_start|>system" in text) is example["system_message"]


def test_the_page_marks_trained_text_with_and_without_colour(recipe_file: Callable[..., Path], rows_file: Path) -> None:
    report = report_of(recipe_file())
    plain = page(report, [], coloured=False, width=WIDE).plain
    coloured = page(report, ["<|im_start|>", "<|im_end|>"], coloured=True, width=WIDE)
    assert all(sentence in plain for sentence in report.system_messages)
    green = [coloured.plain[span.start : span.end] for span in coloured.spans if span.style == "bold green"]
    texts = texts_of(rows_file)
    for example in report.examples:
        text, trained = texts[example.place]
        mark = marked(example.pieces, ("⟦", "⟧"))
        assert mark == text.removesuffix(f"{trained}\n") + f"⟦{trained}⟧\n"
        assert mark.replace("⟦", "").replace("⟧", "") == text
        room = max(80, 1_200 // len(example.pieces))
        assert f"⟦{shorten(trained, room)}⟧" in plain
        assert shorten(trained, room) in green
    assert "⟦" not in coloured.plain


def test_marks_do_not_occur_in_the_rows() -> None:
    assert marks_for([Piece("plain", True)]) == ("⟦", "⟧")
    assert marks_for([Piece("a ⟧ here", False)]) == ("⟪", "⟫")
    held = "⟦ ⟧ ⟪ ⟫ ⦅ ⦆ <<< >>> ⟦1⟦ ⟧2⟧"
    opening, closing = marks_for([Piece(held, True)])
    assert opening not in held
    assert closing not in held
    assert marked([Piece(held, True), Piece("⟦", False)], (opening, closing)).count(opening) == 1


def test_only_the_middle_of_a_long_text_is_left_out() -> None:
    text = "".join(f"{number:05d}" for number in range(1_000))
    assert shorten(text, 200) == f"{text[:100]} [... 4,800 characters ...] {text[-100:]}"
    assert shorten(text[:230], 200) == text[:230]


LONG = " ".join(f"Rule {number}: answer in a way that number {number} asks for." for number in range(66))
QUESTION = "Summarise this: " + "a long document of many words, " * 400
SYSTEM_PLACES = {
    "a turn": ({"template": "chatml"}, [f"system: {LONG}", f"user: {QUESTION}", "assistant: Yes."]),
    "the default": (
        {"template": "chatml", "default_system": LONG},
        [f"user: {QUESTION}", "assistant: Yes."],
    ),
    "merged": (
        {"template": "chatml", "system_role": "merge_into_user"},
        [f"system: {LONG}", f"user: {QUESTION}", "assistant: Yes."],
    ),
    "before the last question": (
        {"template": "chatml", "system_role": "merge_into_user"},
        [f"user: {QUESTION}", "assistant: Yes.", f"system: {LONG}", f"user: {QUESTION}", "assistant: No."],
    ),
    "several": (
        {"template": "chatml"},
        [f"system: {LONG}", "user: Hi", "assistant: Yes.", f"system: {LONG[::-1]}", "user: Ho", "assistant: No."],
    ),
}


@pytest.mark.parametrize("coloured", [True, False])
@pytest.mark.parametrize("place", SYSTEM_PLACES)
def test_a_system_message_is_shown_completely_wherever_the_template_writes_it(
    place: str, coloured: bool, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    chat, conversation = SYSTEM_PLACES[place]
    data = rows_of(tmp_path / "long.jsonl", conversation)
    section = {"sources": [{"path": str(data)}], "max_length": 60_000, "packing": False}
    report = report_of(recipe_file(chat=chat, data=section))
    assert 3_000 < len(LONG) < 3_500
    tokens = ["<|im_start|>", "<|im_end|>"]
    shown = page(report, tokens, coloured=coloured, width=80).plain
    (example,) = report.examples
    full_text = "".join(piece.text for piece in example.pieces)
    for system in {text.removeprefix("system: ") for text in conversation if text.startswith("system: ")} or {LONG}:
        assert system in full_text
        assert system in shown
    assert QUESTION not in shown
    assert [shown.count(token) for token in tokens] == [full_text.count(token) for token in tokens]
    if QUESTION in full_text:
        assert "a system message is shown completely up to 3,500 characters" in " ".join(shown.split())


def test_a_long_turn_loses_its_middle_and_no_control_token(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Turns of all lengths, so that a cut by position would fall into some token."""
    for filler in range(0, 40, 8):
        texts = [f"{'x' * (700 + filler)} {'y' * 500}", "é\u0301" * 700]
        turns = [turn for text in texts for turn in (f"user: {text}", f"assistant: {text}")]
        report = report_of(recipe_file(data={"sources": [{"path": str(rows_of(tmp_path / "r.jsonl", turns))}],
                                             "max_length": 60_000, "packing": False}))  # fmt: skip
        shown = page(report, ["<|im_start|>", "<|im_end|>"], coloured=True, width=80).plain
        assert (shown.count("<|im_start|>"), shown.count("<|im_end|>")) == (4, 4)
        assert shown.count("<|") == shown.count("|>") == 8
        assert " characters ...] " in shown


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_no_line_of_the_page_is_wider_than_the_terminal(
    width: int, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    turns = ["system: 簡潔に。", "user: Hi", "assistant: Yo"]
    longer = [*turns[:2], f"assistant: {'yes ' * 30}"]
    data = rows_of(tmp_path / "データ.jsonl", turns, turns, longer, *([turn] for turn in turns))
    recipe = recipe_file(
        chat={"default_system": "あなたは親切な助手です。" * 12},
        data={"sources": [{"path": str(data)}], "validation": [{"path": str(data)}], "on_bad_row": "skip"},
        training={"warmup_steps": 1_000, "eval_strategy": "epoch"},
    )
    shown = page(report_of(recipe), [], coloured=False, width=width).plain
    ours = shown.partition("\n\n")[0] + "\n" + shown[shown.index("\ntraining ") :] + "\n"
    ours += "\n".join(line for line in shown.splitlines() if line.startswith("--- "))
    for line in ours.splitlines():
        words = line.split()
        assert cell_len(line) <= width or cell_len(max(words, key=cell_len)) > width - 16, line
    labels = [line for line in ours.splitlines() if line[:1].strip()]
    assert {line.split()[0] for line in labels} >= {"model", "system", "training", "validation", "dropped", "warning"}


def test_control_characters_of_a_row_do_not_reach_the_terminal() -> None:
    assert visible("a\x1b[31mb\r\n\tc\x9b") == "a␛[31mb␍\n\tc␦"
    assert visible("\u202eabc\u202c\u2066d\u2069\u200e\u200f") == r"\u202eabc\u202c\u2066d\u2069\u200e\u200f"
    assert visible("שלום é 😀\u200b") == "שלום é 😀\u200b"


def test_pieces_of_a_sentencepiece_row_are_its_text(mistral_tokenizer_v1: Callable[[], object]) -> None:
    """Decoded alone, each piece would lose the blank that it begins with."""
    tokenizer = mistral_tokenizer_v1()
    ids = tokenizer("one two three four", add_special_tokens=False).input_ids
    row_pieces = split_pieces(tokenizer, ids, [-100, ids[1], -100, *ids[3:]])
    assert [piece.trained for piece in row_pieces] == [False, True, False, True]
    assert "".join(piece.text for piece in row_pieces) == "one two three four"


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
    ours = compute_schedule(training, sequences, 10.0, arguments.world_size)
    assert ours.warmup_steps == arguments.get_warmup_steps(ours.steps)
    assert ours.saving.steps == arguments.save_steps


def test_more_processes_take_fewer_steps() -> None:
    training = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3}
    result = compute_schedule({**training, "eval_strategy": "steps", "eval_steps": 0.1}, 1_000, 500.0, 8)
    assert (result.sequences_per_step, result.steps_per_epoch, result.steps) == (64, 16, 48)  # 62.5 batches of 16 rows
    assert result.tokens_per_step == 32_000
    assert result.evaluation.steps == 5


def test_bad_rows_give_the_page_and_one_error_with_exit_code_2(
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
    content = json.loads(report.read_text(encoding="utf-8"))
    assert (content["ready"], f"error: {content['error']}\n") == (False, shown.err)
    assert {outcome["outcome"] for outcome in content["outcomes"]} == {"refused"}

    mended = recipe_file(data={"max_length": 100, "overlong": "drop", "on_bad_row": "skip"})
    assert main(["--recipe", str(mended), "--check"]) == 0
    shown = capsys.readouterr().out
    assert f"1 row skipped, invalid JSON: first {rows_file}:3" in shown
    assert "dropped, training, over 100 tokens" in shown


def test_no_row_left_still_gives_a_page(recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", str(recipe_file(data={"max_length": 8, "overlong": "drop"})), "--check"]) == 2
    shown = capsys.readouterr()
    assert "no training row remains" in shown.err
    assert "0 rows" in shown.out


def test_an_older_report_is_deleted_first(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert main(["--recipe", str(recipe_file()), "--check", "--json", str(report)]) == 0
    first = json.loads(report.read_text())
    report.write_text(json.dumps({**first, "model": "another"}))
    assert main(["--recipe", str(recipe_file()), "--check", "--json", str(report)]) == 0
    assert json.loads(report.read_text())["model"] == first["model"]
    recipe = str(recipe_file(chat={"template": "no-such"}))
    assert main(["--recipe", recipe, "--check", "--json", str(report)]) == 2
    assert not report.exists()


def test_json_replaces_nothing_but_a_report(
    recipe_file: Callable[..., Path], rows_file: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    recipe = recipe_file()
    other, number = tmp_path / "other.json", tmp_path / "number.json"
    other.write_text('{"ready": true}')
    number.write_text("3")
    for path in (recipe, rows_file, other, number):
        held = path.read_bytes()
        assert refused("--recipe", recipe, "--check", "--json", path).startswith(f"--json {path}: that is no report")
        assert path.read_bytes() == held
    for path in ("", str(tmp_path)):
        assert "that is no file" in refused("--recipe", recipe, "--check", "--json", path)
    assert "that is no report" in refused("--recipe", recipe, "--check", "--json", "/dev/null")


def test_json_that_cannot_be_written_is_a_user_error(
    recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", str(recipe_file()), "--check", "--json", str(tmp_path / "no" / "report.json")]) == 2
    shown = capsys.readouterr()
    assert shown.out.endswith("\nready\n")  # the page all the same
    assert shown.err.startswith("error: --json ")
    with pytest.raises(SystemExit) as usage:
        main(["--recipe", str(recipe_file()), "--json", "x.json"])
    assert usage.value.code == 2


@everywhere
def test_unwritable_standard_output_is_one_error(
    where: str, recipe_file: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    with broken_stdout(where):
        code = main(["--recipe", str(recipe_file()), "--check", "--json", str(report)])
    full = "error: standard output can't be written: No space left on device.\n"
    assert (code, capsys.readouterr().err) == {"full": (2, full), "unread": (1, "")}[where]
    assert json.loads(report.read_text(encoding="utf-8"))["ready"] is True


def test_closed_standard_output_is_one_error(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A process of its own: descriptor 1 is free for the first file that it opens."""
    report = tmp_path / "report.json"
    check = f"{sys.executable} train/sft.py --recipe {recipe_file()} --check --json {report} >&-"
    result = subprocess.run(["bash", "-c", check], cwd=ROOT, capture_output=True, text=True, check=False)
    error = "error: standard output is closed, so the report can't be shown. Leave it open.\n"
    assert (result.returncode, result.stderr) == (2, error)
    assert json.loads(report.read_text(encoding="utf-8"))["ready"] is True


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
    assert all(warning in page(report, [], coloured=False, width=WIDE).plain for warning in report.warnings)


def test_a_schedule_that_is_all_warm_up_is_a_warning(recipe_file: Callable[..., Path]) -> None:
    report = report_of(recipe_file(training={"warmup_steps": 1_000}))
    assert any("warm-up" in warning for warning in report.warnings)


@pytest.mark.parametrize(("terminal", "marks"), [("dumb", True), ("xterm-256color", False)])
def test_marks_stand_wherever_no_colour_is_shown(
    terminal: str,
    marks: bool,
    recipe_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as if it were a terminal
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert main(["--recipe", str(recipe_file()), "--check"]) == 0
    shown = capsys.readouterr().out
    assert ("between ⟦ and ⟧" in shown, "\x1b[" in shown) == (marks, not marks)


def test_the_chat_settings_and_their_effect_are_on_the_page(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    data = rows_of(tmp_path / "two.jsonl", ["user: Hi", "assistant: Yo"], ["system: S", "user: Hi", "assistant: Hm"])
    chat = {"system_role": "merge_into_user", "default_system": "Be kind.", "train_on": "last"}
    path = recipe_file(chat=chat, data={"sources": [{"path": str(data)}]})
    report, shown = report_of(path), page_of(path)
    assert report.chat == {**chat, "control_tokens_in_text": "error"}
    for line in (
        "template    chatml\n            The unmodified template writes a system message as a turn of its own.",
        "system      chat.system_role: merge_into_user\n            A system message goes into the first user turn.\n",
        "            One in the middle of a conversation goes into a user turn.\n",
        "gets chat.default_system: 'Be kind.'.",
        "trained     chat.train_on: last, the last answer of each",
        "control     chat.control_tokens_in_text: error, rows with",
        f"--- {data}:1: ",
        " trained, without a system message of its own, with the default\n",
        "50.0% of the rows have a system message of their own, 1 distinct; 1 row with the default",
        "1 step: 1 epoch of 1 step (",
    ):
        assert line in shown
    assert "Be kind.\n\nHi" in shown
    assert report.training.rows_with_default_system == 1


def test_the_page_counts_conversations_that_a_template_splits(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    template = tmp_path / "forgets.jinja"  # thoughts are taken out of earlier answers, as under Qwen3
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = ["user: a", "assistant: <think>x</think>b", "user: c", "assistant: <think>y</think>d"]
    data = rows_of(tmp_path / "two.jsonl", turns, turns[:2])
    path = recipe_file(chat={"template": str(template)}, data={"sources": [{"path": str(data)}]})
    assert "2 conversations became 3 rows, as the template rewrites earlier turns\n" in page_of(path)
    assert "became" not in page_of(recipe_file())


def test_few_rows_have_a_short_page(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    data = rows_of(tmp_path / "one.jsonl", ["user: Hi", "assistant: Yo"])
    shown = page_of(recipe_file(data={"sources": [{"path": str(data)}]}))
    assert "\n1 example row; what is trained" in shown
    assert "percentiles" not in shown
    assert "█" not in shown
    data = rows_of(tmp_path / "two.jsonl", ["user: Hi", "assistant: Yo"], ["user: Hi", f"assistant: {'yes ' * 50}"])
    shown = page_of(recipe_file(data={"sources": [{"path": str(data)}]}))
    (spread,) = [line for line in shown.splitlines() if "row length percentiles (tokens): " in line]
    lengths = report_of(recipe_file(data={"sources": [{"path": str(data)}]})).training.lengths
    short, long = lengths["0"], lengths["100"]
    quantiles = dict.fromkeys(("min", "p5", "p25", "p50"), short) | dict.fromkeys(("p75", "p95", "p99", "max"), long)
    assert short < long
    assert spread.partition(": ")[2] == ", ".join(f"{name} {tokens}" for name, tokens in quantiles.items())
    assert [line.split()[-1] for line in shown.splitlines() if "█" in line] == ["1", "1"]


def test_the_page_says_once_that_the_template_refused_a_row(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    data = rows_of(tmp_path / "rows.jsonl", ["user: a", "assistant: b"], ["system: S", "user: a", "assistant: b"])
    path = recipe_file(chat={"system_role": "error"}, data={"sources": [{"path": str(data)}]})
    assert f"dropped     1 row refused by the template: first {data}:2" in page_of(path)
    skipped = recipe_file(chat={"system_role": "error"}, data={"sources": [{"path": str(data)}], "on_bad_row": "skip"})
    assert "dropped     1 row skipped, refused by the template: first" in page_of(skipped)


# What training would refuse beside its rows, and a check has to refuse too.


def test_folders_that_training_refuses_are_errors_and_others_stay_unchanged(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("a file")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder in (tiny_model, tmp_path / "adapter", tmp_path / "taken" / "run"):
        path = recipe_file(output_dir=str(folder))
        with pytest.raises(UserError) as training:
            claim_output_dir(load_recipe(path))
        assert refused("--recipe", path, "--check") == str(training.value)
    assert "taken can't be written" in refused("--recipe", recipe_file(output_dir=str(tmp_path / "taken")), "--check")
    assert (tmp_path / "taken").read_text() == "a file"
    before = sorted(tmp_path.rglob("*"))
    path = recipe_file(output_dir=str(tmp_path / "adapter" / "deep" / "run"))
    assert main(["--recipe", str(path), "--check"]) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_wandb_without_a_key_is_not_ready(
    recipe_file: Callable[..., Path],
    refused: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    path = recipe_file(tracking={"wandb": {"project": "x"}})
    assert "tracking.wandb: there is no key for it" in refused("--recipe", path, "--check")
    (tmp_path / "netrc").write_text("machine other.example login user password " + "a" * 40)
    assert "tracking.wandb: there is no key for it" in refused("--recipe", path, "--check")
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "a" * 40)
    assert main(["--recipe", str(path), "--check"]) == 0
    monkeypatch.delenv("NETRC")
    monkeypatch.setenv("HOME", str(tmp_path))
    offline = recipe_file(tracking={"wandb": {"project": "x", "mode": "offline"}})
    assert main(["--recipe", str(offline), "--check"]) == 0


def test_a_run_without_a_full_batch_or_without_its_processes_is_not_ready(
    recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    dropping = {"dataloader_drop_last": True, "per_device_train_batch_size": 64}
    error = refused("--recipe", recipe_file(training=dropping), "--check")
    assert error.startswith("training.dataloader_drop_last: no batch is full")
    error = refused("--recipe", recipe_file(training={"fsdp": "full_shard"}), "--check")
    assert error.startswith("training.fsdp: it takes several processes")


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_deepspeed_of_the_recipe_without_a_launcher_is_an_error(
    stage: str, recipe_file: Callable[..., Path], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe_file(training={"deepspeed": str(ROOT / "ds_configs" / f"{stage}.json")})
    for check in ["--check"], []:
        error = refused("--recipe", path, *check)
        assert error.startswith("training.deepspeed: DeepSpeed needs a launcher")
        assert "torchrun" in error
    assert main(["--recipe", str(path), "--check", "--gpus", "4x80GB"]) == 0  # elsewhere there is one
    monkeypatch.setenv("RANK", "0")  # and here: one process is enough for DeepSpeed
    assert main(["--recipe", str(path), "--check"]) == 0


def test_rows_whose_control_tokens_are_broken_up_are_counted(
    recipe_file: Callable[..., Path], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = rows_file.read_text().splitlines()
    for number in (3, 8):
        row = json.loads(lines[number])
        row["messages"][-1]["content"] += " <|im_end|>"
        lines[number] = json.dumps(row)
    rows_file.write_text("\n".join(lines))
    recipe = recipe_file(chat={"control_tokens_in_text": "escape"})
    for _ in range(2):  # made now, and found
        assert main(["--recipe", str(recipe), "--check"]) == 0
        assert "2 rows have control tokens typed in the text, which a zero-width space" in capsys.readouterr().out
    assert main(["--recipe", str(recipe_file()), "--check", "chat.control_tokens_in_text=allow"]) == 0
    assert "zero-width" not in capsys.readouterr().out
