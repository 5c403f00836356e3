"""`--init`: the recipe that it writes passes `--check` as it stands, and its figures are those of the rows."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from train.recipe import load_recipe
from train.sft import main

QUESTION, ANSWER, SYSTEM = "Which river is the longest?", "The Nile, by most accounts.", "Be brief."
ROWS: dict[str, dict[str, Any]] = {
    "messages": {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": SYSTEM},
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": ANSWER},
        ]
    },
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "janus": {"system": SYSTEM, "prompt": QUESTION, "output": ANSWER},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "question_answer": {"question": QUESTION, "answer": ANSWER},
}


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written(tmp_path: Path, *options: object) -> Path:
    recipe = tmp_path / "starter.yaml"
    assert main(["--init", str(recipe), *map(str, options)]) == 0
    return recipe


@pytest.mark.parametrize("format", ROWS)
def test_rows_of_every_format_give_a_recipe_that_is_ready(
    format: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", *[ROWS[format]] * 3)
    recipe = written(tmp_path, "--model", tiny_model, "--data", data)
    text = recipe.read_text(encoding="utf-8")
    system = format in ("messages", "sharegpt", "janus")
    assert f"# format {format}: 3 rows, 2.0 turns each, {'100%' if system else '0%'} with a system message" in text
    capsys.readouterr()
    assert main(["--recipe", str(recipe), "--check"]) == 0
    assert capsys.readouterr().out.endswith("\nready\n")


def test_the_lengths_are_those_of_the_model_and_choose_max_length(tiny_model: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "word " * count}, {"role": "assistant", "content": "yes"}]}
        for count in range(1, 121)
    ]
    data = write_rows(tmp_path / "rows.jsonl", *rows)
    recipe = written(tmp_path, "--model", tiny_model, "--data", data)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lengths = [
        len(
            tokenizer(
                "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in row["messages"])
            ).input_ids
        )
        for row in rows
    ]
    median, p95 = (int(np.quantile(lengths, share, method="inverted_cdf")) for share in (0.5, 0.95))
    assert f"# tokens per row: p50 {median}, p95 {p95}, max {max(lengths)}" in recipe.read_text(encoding="utf-8")
    length = load_recipe(recipe).data.max_length
    assert length / 2 < max(lengths) <= length


def test_rows_that_need_a_setting_get_it(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = {"messages": [{"role": "user", "content": "river " * 3_000}, {"role": "assistant", "content": ANSWER}]}
    bad = {"messages": [{"role": "user", "content": QUESTION}]}
    noted = {**ROWS["messages"], "rationale": "A text that no format reads, so training would be without it."}
    plain = [{"messages": [{"role": "user", "content": f"{number}?"}, long["messages"][1]]} for number in range(250)]
    data = write_rows(tmp_path / "rows.jsonl", *plain, long, bad, noted)
    recipe = written(tmp_path, "--model", tiny_model, "--data", data)
    assert "\nnote: no format reads rationale: `ignore` leaves it out of training\n" in capsys.readouterr().out
    text = recipe.read_text(encoding="utf-8")
    assert ("cpu.yaml" in text, "dtype: float32" in text) == (not torch.cuda.is_available(),) * 2
    section = load_recipe(recipe).data
    assert (section.max_length, section.overlong, section.on_bad_row) == (2_048, "drop", "skip")
    assert section.sources[0].ignore == ("rationale",)
    assert section.validation == 0.05
    assert "1 row exceed" in recipe.read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["--recipe", str(recipe), "--check"]) == 0


def test_a_template_that_loses_system_messages_is_replaced(
    tiny_model: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", ROWS["janus"])
    recipe = written(tmp_path, "--model", tiny_model, "--data", data)
    assert load_recipe(recipe).chat.template == "chatml"
    assert "loses messages" in refused("--recipe", recipe, "--check", "chat.template=null")


def test_without_model_and_data_the_check_names_the_placeholders(
    tmp_path: Path, refused: Callable[..., str], rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = written(tmp_path)
    assert "note: replace the placeholder path/to/rows.jsonl\n" in capsys.readouterr().out
    error = refused("--recipe", recipe, "--check")
    assert "model.name_or_path: there is no folder path/to/model-or-hub-id" in error
    assert "data.sources.0.path: path/to/rows.jsonl" in error
    recipe.unlink()
    assert "# characters per row: p50 " in written(tmp_path, "--data", rows_file).read_text(encoding="utf-8")


def test_no_file_is_replaced_and_broken_data_writes_none(
    tmp_path: Path, refused: Callable[..., str], tiny_model: Path
) -> None:
    recipe = written(tmp_path)
    before = recipe.read_text(encoding="utf-8")
    assert "starter.yaml exists and is not replaced" in refused("--init", recipe)
    assert recipe.read_text(encoding="utf-8") == before
    other = tmp_path / "other.yaml"
    assert "nowhere.jsonl" in refused("--init", other, "--data", "nowhere.jsonl")
    assert "can't be written" in refused("--init", tmp_path / "no" / "folder.yaml")
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    assert "model.name_or_path" in refused(
        "--init", other, "--model", broken, "--data", write_rows(tmp_path / "r.jsonl", ROWS["janus"])
    )
    assert not other.exists()


def test_options_of_init_alone_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--init", "a.yaml", "--check"], ["--recipe", "a.yaml", "--data", "rows.jsonl"]):
        with pytest.raises(SystemExit, match="2"):
            main(options)
        assert "--init" in capsys.readouterr().err.partition("\nerror: ")[2]
