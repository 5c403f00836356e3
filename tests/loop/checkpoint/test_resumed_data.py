"""Resumed data: the same tokens in other files are no change, other tokens are refused with their differences."""

import json
import shutil
from collections.abc import Callable
from datetime import date, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.json
import pyarrow.parquet
import pytest
import xxhash
import yaml

from train.data.chat import template as chat_template
from train.data.chat.template import pin_date, use_template
from train.data.prepare import prepare
from train.data.tokens.table import TokensDigest, TokenTable
from train.errors import UserError
from train.loop.checkpoint.fingerprint import data_fingerprint
from train.loop.checkpoint.manifest import COMPLETE, format_manifest, read_checkpoint
from train.loop.checkpoint.resume import find_checkpoint, get_run_date, refuse_changes
from train.model.tokenizer import load_tokenizer
from train.recipe import load_recipe
from train.sft import main

DATED = """{{- strftime_now("%d %b %Y") }}
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows_of(count: int) -> list[dict[str, Any]]:
    texts = [[("user", f"cloud {number}"), ("assistant", "seven " * (2 + number))] for number in range(count)]
    return [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in texts]


ROWS = rows_of(8)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return the folder of a finished run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    write(folder / "rows.jsonl", ROWS)
    recipe = {
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "chat": {"template": "chatml"},
        "data": {"sources": [{"path": str(folder / "rows.jsonl")}], "max_length": 64},
        "training": {
            **{"bf16": False, "gradient_checkpointing": False, "per_device_train_batch_size": 2},
            **{"max_steps": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2},
        },
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["--recipe", str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture
def resumed(finished: Path) -> Callable[..., None]:
    """Find the run's checkpoint and compare the data, as a start does. Raises UserError."""

    def compare(*overrides: str, anyway: tuple[str, ...] = (), run: Path | None = None) -> None:
        recipe = load_recipe(finished / "recipe.yaml", [*overrides, f"output_dir={run or finished / 'run'}"])
        checkpoint = find_checkpoint("auto", recipe, anyway)
        assert checkpoint is not None
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        pin_date(tokenizer, get_run_date(checkpoint))
        before = {key: value for key, value in checkpoint.manifest["run"].items() if key.startswith("made.")}
        refuse_changes(checkpoint, before, data_fingerprint(prepare(recipe, tokenizer), tokenizer), anyway)

    return compare


def elsewhere(folder: Path) -> str:
    write(folder / "other-name.jsonl", ROWS)
    return str(folder / "other-name.jsonl")


def two_files(folder: Path) -> str:
    (folder / "parts").mkdir()
    write(folder / "parts" / "0.jsonl", ROWS[:3])
    write(folder / "parts" / "1.jsonl", ROWS[3:])
    return str(folder / "parts")


def parquet(folder: Path) -> str:
    write(folder / "rows.jsonl", ROWS)
    table = pyarrow.json.read_json(folder / "rows.jsonl")
    pyarrow.parquet.write_table(table, folder / "rows.parquet", row_group_size=3)
    return str(folder / "rows.parquet")


def another_format(folder: Path) -> str:
    """Return the same conversations as questions and answers."""
    turns = [[message["content"] for message in row["messages"]] for row in ROWS]
    write(folder / "pairs.jsonl", [{"question": question, "answer": answer} for question, answer in turns])
    return str(folder / "pairs.jsonl")


@pytest.mark.parametrize("kept", [elsewhere, two_files, parquet, another_format])
def test_the_same_rows_in_other_files_are_no_change(
    kept: Callable[[Path], str], resumed: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed(f"data.sources.0.path={kept(tmp_path)}")
    assert "changed since" not in capsys.readouterr().out


def test_other_code_with_the_same_tokens_is_no_change(
    resumed: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rows are tokenized again, as after an edit of these modules or an update of a package."""
    monkeypatch.setattr("train.data.cache.VERSION", 0)
    resumed(f"data.cache_dir={tmp_path}")
    assert len([*tmp_path.glob("*/rows.arrow")]) == 1
    assert "made." not in capsys.readouterr().out


def test_a_template_under_another_name_is_reported_and_no_change_of_the_data(
    resumed: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own.jinja"
    shutil.copy(chat_template.TEMPLATES / "chatml.jinja", own)
    resumed(f"chat.template={own}")
    assert f'chat.template "chatml" -> "{own}"' in capsys.readouterr().out


def test_other_rows_are_refused_with_source_and_counts(
    resumed: Callable[..., None], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    counts = json.loads((finished / "run" / "checkpoint-2" / COMPLETE).read_text(encoding="utf-8"))["run"][
        "made.tokens"
    ][0]
    before = (
        f"8 rows of {counts['tokens']:,} tokens ({counts['trained_tokens']:,} trained) in {finished / 'rows.jsonl'}"
    )
    other = json.loads(json.dumps(ROWS))
    other[5]["messages"][0]["content"] = "cloud 4"  # as many tokens
    shorter = json.loads(json.dumps(ROWS))
    shorter[0]["messages"][1]["content"] = "seven"
    weighted = [*ROWS[:7], {**ROWS[7], "loss_weight": 0.5}]
    for rows, now in (
        (other, "the same number of others"),
        (ROWS[::-1], "the same number of others"),
        (weighted, "the same number of others"),
        (ROWS[:7], "7 rows of "),
        (rows_of(9), "9 rows of "),
        (shorter, "8 rows of "),
    ):
        write(path, rows)
        with pytest.raises(UserError) as refusal:
            resumed(f"data.sources.0.path={path}")
        assert f"made.tokens was {before} and is {now}" in str(refusal.value)
        assert "--resume-anyway made.tokens" in str(refusal.value)
    write(path, other)
    capsys.readouterr()
    resumed(f"data.sources.0.path={path}", anyway=("data.sources",))
    assert f"made.tokens {before} -> the same number of others (in force from step 3)" in capsys.readouterr().out


def test_a_policy_or_a_template_that_changes_tokens_is_refused(resumed: Callable[..., None], tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    text = (chat_template.TEMPLATES / "chatml.jinja").read_text(encoding="utf-8")
    own.write_text(f"Hello\n{text}", encoding="utf-8")
    with pytest.raises(UserError, match=r"made\.tokens was 8 rows of .* and is 8 rows of "):
        resumed(f"chat.template={own}")
    with pytest.raises(UserError, match=r"data\.sources was .* and is "):
        resumed("data.sources.0.weight=0.5")
    with pytest.raises(UserError, match=r"data\.sources was .* and is .*'loss_weight': 0\.5"):
        resumed("data.sources.0.loss_weight=0.5")
    resumed("data.sources.0.loss_weight=0.5", anyway=("data.sources",))
    with pytest.raises(UserError, match=r"data\.validation was None and is 0\.25"):
        resumed("data.validation=0.25")
    resumed("data.validation=0.25", anyway=("data.validation",))  # which rows and how they are packed follows


def test_rows_that_min_gain_leaves_out_are_other_rows(resumed: Callable[..., None], tmp_path: Path) -> None:
    """The file itself may change as long as it leaves out the same rows."""

    def gains(*of_rows: float) -> str:
        texts = ["\0".join(text for turn in row["messages"] for text in turn.values()) for row in ROWS]
        digests = [xxhash.xxh3_128(text.encode()).hexdigest() for text in texts]
        pairs = zip(digests, of_rows, strict=True)
        write(tmp_path / "gains.jsonl", [{"conversation": digest, "m": {"gain": gain}} for digest, gain in pairs])
        return f"data.sources.0.min_gain={tmp_path / 'gains.jsonl'}"

    resumed(gains(*[0.5] * 8))
    resumed(gains(*range(1, 9)))
    with pytest.raises(UserError, match=r"made\.rows was .* and is .* \(the rows of training and validation"):
        resumed(gains(0.0, *[0.5] * 7))


def test_a_checkpoint_of_an_earlier_version_is_compared_by_the_keys_that_it_has(
    resumed: Callable[..., None], finished: Path, tmp_path: Path
) -> None:
    """It had names of caches in place of tokens, no rows, and no `min_gain` in its sources."""
    shutil.copytree(finished / "run" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    manifest = dict(read_checkpoint(finished / "run" / "checkpoint-2").manifest)
    run = {key: value for key, value in manifest["run"].items() if key not in ("made.rows", "made.date")}
    sources = [{name: value for name, value in source.items() if name != "min_gain"} for source in run["data.sources"]]
    manifest["run"] = {**run, "made.tokens": ["0123456789abcdef"], "data.sources": sources}
    del manifest["sequences_per_epoch"]
    (tmp_path / "run" / "checkpoint-2" / COMPLETE).write_text(format_manifest(manifest), encoding="utf-8")
    resumed(run=tmp_path / "run")
    write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(UserError, match=r"data\.sources was "):
        resumed(f"data.sources.0.path={tmp_path / 'rows.jsonl'}", run=tmp_path / "run")
    arguments = ["--recipe", str(finished / "recipe.yaml"), f"output_dir={tmp_path / 'run'}", "training.max_steps=4"]
    assert main([*arguments, "--resume-anyway", "training.max_steps"]) == 0


def test_a_resumed_run_keeps_the_date_of_its_start(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(DATED, encoding="utf-8")
    arguments = [
        "--recipe",
        str(finished / "recipe.yaml"),
        f"output_dir={tmp_path / 'run'}",
        f"chat.template={template}",
    ]
    begun = date.today() - timedelta(days=40)

    class Begun(date):
        @classmethod
        def today(cls) -> date:
            return begun

    with monkeypatch.context() as patch:
        patch.setattr("train.loop.checkpoint.resume.date", Begun)
        assert main(arguments) == 0
    assert read_checkpoint(tmp_path / "run" / "checkpoint-2").manifest["run"]["made.date"] == begun.isoformat()
    capsys.readouterr()
    arguments.append("training.max_steps=4")
    assert main([*arguments, "--resume-anyway", "training.max_steps"]) == 0
    assert "made." not in capsys.readouterr().out
    manifest = read_checkpoint(tmp_path / "run" / "checkpoint-4").manifest["run"]
    assert manifest["made.date"] == begun.isoformat()
    assert main([*arguments, "--check"]) == 0
    page = capsys.readouterr().out
    assert f"rows are rendered with {begun:%d %B %Y}, the day on which the run starts" in " ".join(page.split())
    assert ", found; tokens by" in " ".join(page.split())
    assert f"{begun:%d %b %Y}" in page
    saved = (tmp_path / "run" / "chat_template.jinja").read_text(encoding="utf-8")
    assert saved == DATED  # served with the date of its day


def test_the_digest_depends_on_rows_and_not_on_batches(finished: Path) -> None:
    recipe = load_recipe(finished / "recipe.yaml")
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, "chatml")
    cache = prepare(recipe, tokenizer).caches[0]
    (batch,) = [batch for _, batch in TokenTable([Path(cache.folder) / "rows.arrow"], [[""]])._batches]
    for cuts in ([0, 8], [0, 1, 2, 8], [0, 5, 8]):
        digest = TokensDigest()
        for start, end in pairwise(cuts):
            digest.add(batch.slice(start, end - start))
        assert digest.facts() == cache.tokens
    assert cache.tokens["tokens"] == sum(map(len, batch["input_ids"].to_pylist()))
    for column in "input_ids", "trained":
        values = batch[column].to_pylist()
        values[3] = [*values[3][:-1], values[3][-1] + 1]
        place = batch.schema.get_field_index(column)
        digest = TokensDigest()
        digest.add(
            batch.set_column(place, batch.schema.field(place), pyarrow.array(values, batch.schema.field(place).type))
        )
        assert digest.facts()["digest"] != cache.tokens["digest"]
        assert digest.facts()["tokens"] == cache.tokens["tokens"]
