"""--check of preference training: both halves of example pairs, and the account of pairs."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from train.data.prepare import examine
from train.model.tokenizer import load_chat_tokenizer
from train.preflight.page import page
from train.preflight.report import Report, build_report
from train.recipe import load_recipe

ROWS = [
    ("Be brief.", "What is tea?", "A drink.", "Tea is a drink that is made of leaves."),
    ("Be long.", "What is tea?", "Tea is a drink that is made of leaves.", "A drink."),
    ("", "And coffee?", "Too.", "No."),
    ("", "And coffee?", "No.", "Too."),
    ("", "And water?", "Yes.", "Yes."),
]


def report_of(recipe_file: Path) -> Report:
    recipe = load_recipe(recipe_file)
    chat = load_chat_tokenizer(recipe.model, recipe.chat)
    return build_report(recipe, chat, examine(recipe, chat.tokenizer))


@pytest.fixture
def report(recipe_file: Callable[..., Path], tmp_path: Path) -> Report:
    path = tmp_path / "pairs.jsonl"
    names = ("system", "prompt", "chosen", "rejected")
    path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in ROWS))
    preference = {"loss": "dpo", "loss_type": ["robust"], "label_smoothing": 0.1}
    return report_of(recipe_file(data={"sources": [{"path": str(path)}], "on_bad_row": "skip"}, preference=preference))


def test_the_page_shows_pairs_with_the_answer_of_each_half_marked(report: Report) -> None:
    shown = page(report, [], coloured=False, width=10_000).plain
    assert "3 example pairs, both halves of each; what is trained stands between ⟦ and ⟧" in shown
    assert len(report.examples) == 6
    for chosen, rejected in zip(report.examples[::2], report.examples[1::2], strict=True):
        place = chosen.place.removesuffix(", chosen")
        assert rejected.place == f"{place}, rejected"
        system, prompt, *answers = ROWS[int(place.rpartition(":")[2]) - 1]
        before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
        before += f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        for example, answer in zip((chosen, rejected), answers, strict=True):
            assert f"--- {example.place}: {example.tokens} tokens, {example.trained_tokens} trained" in shown
            assert f"{before}⟦{answer}<|im_end|>⟧\n" in shown


def test_the_page_accounts_for_pairs(report: Report) -> None:
    shown = page(report, [], coloured=False, width=10_000).plain
    for line in (
        "preference  dpo, loss_type: [robust], beta: 0.1, label_smoothing: 0.1\n",
        "training    4 pairs, ",
        "50.0% of the pairs have a system message of their own, 2 distinct\n",
        "the chosen one is longer in 50.0% of the pairs, shorter in 50.0%\n",
        "2.0 pairs each on average" if report.training.sequences == 2 else "4.0 pairs each on average",
        "length percentiles of the longer half (tokens): min ",
        "dropped     1 row skipped, identical answers: first ",
        "2 training pairs contradict another: ",
        "\nready",
    ):
        assert line in shown, line


def test_the_json_has_the_section_and_the_counts_of_pairs(report: Report, recipe_file: Callable[..., Path]) -> None:
    import dataclasses

    values = dataclasses.asdict(report)
    assert values["preference"]["loss_type"] == ["robust"]
    assert values["training"]["pairs"]["contradictory"]["rows"] == 2
    single = dataclasses.asdict(report_of(recipe_file()))
    assert values.keys() - single.keys() == {"preference"}
    assert values["training"].keys() - single["training"].keys() == {"pairs"}


def test_pairs_of_siblings_name_the_row_of_the_rejected_answer(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [dict(zip(("system", "prompt", "output"), row, strict=False)) for row in ROWS[:3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = report_of(recipe_file(data={"sources": [{"path": str(path)}]}, preference={"loss": "orpo"}))
    assert [example.place for example in report.examples] == [
        f"{path}:1, chosen",
        f"{path}:1, rejected, the answer of {path}:2",
        f"{path}:2, chosen",
        f"{path}:2, rejected, the answer of {path}:1",
    ]
    shown = page(report, [], coloured=False, width=10_000).plain
    for line in (
        "preference  orpo, beta: 0.1\n",
        "2 pairs of two rows with the same instruction: ",
        "dropped     1 row left out, no other row has its instruction under another system message (data.sources.0): "
        f"first {path}:3: 1 row with its instruction\n",
    ):
        assert line in shown, line


def test_the_command_checks_pairs(recipe_file: Callable[..., Path], report: Report, capsys) -> None:
    from train.preflight.check import check

    path = Path(report.caches[0].source)
    data = {"sources": [{"path": str(path)}], "on_bad_row": "skip", "validation": 0.5}
    check(load_recipe(recipe_file(data=data, preference={"loss": "dpo"})))
    shown = capsys.readouterr().out
    assert shown.endswith("\nready\n")
    joined = " ".join(shown.split())
    assert "no validation pair has an instruction that is also in training" in joined
    assert "system gain measured at each evaluation on" in joined or "system gain not measured" in joined
