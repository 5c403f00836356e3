"""Worker processes give the tokens of rows encoded one by one, and the token table gives them back."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from train.data.chat.rendering import ShortcutError
from train.data.chat.template import use_template
from train.data.loss_mask import encode
from train.data.prepare import examine
from train.data.sources.formats import RowError
from train.data.sources.source import open_source
from train.data.tokens.table import TokenTable, write_table
from train.data.tokens.workers import RowTokenizer, tokenize
from train.errors import UserError
from train.model.tokenizer import load_tokenizer
from train.recipe import Source, load_recipe

LETTERS = "abc XYZ\n\t.,'é\u0301日本한글😀👩‍🚀\u200b"


@pytest.fixture
def many(tmp_path: Path) -> list[list[dict]]:
    """900 conversations of one to three answers in three chunks or more, some without a system message, some bad."""
    rng = random.Random(3)
    text = lambda: "".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 900))) + "."  # noqa: E731
    rows = []
    for row in range(900):
        system = [{"role": "system", "content": text()}] * (row % 3 > 0)
        turns = [{"role": role, "content": text()} for _ in range(1 + row % 3) for role in ("user", "assistant")]
        rows.append(system + (turns[:-1] if row % 211 == 7 else turns))
    with (tmp_path / "many.jsonl").open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
    return rows


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_rows_on_disk_are_the_rows_one_by_one(chatml_tokenizer, many, tmp_path: Path, processes: int) -> None:
    opened = open_source(Source(path=str(tmp_path / "many.jsonl")))
    chunks = list(opened.chunks())
    assert len(chunks) >= 3
    rows = RowTokenizer(chatml_tokenizer, "assistant", fast=True)
    results = list(tokenize(rows, chunks, "messages", processes))
    write_table(tmp_path / "rows.arrow", (batch for batch, _ in results))
    stored = TokenTable([tmp_path / "rows.arrow"], [opened.files])

    refused = sum(count for _, errors in results for count, _ in errors.errors.values())
    good = []
    for number, messages in enumerate(many, 1):
        try:
            good += [(number, messages, row) for row in encode(chatml_tokenizer, messages)]
        except RowError:
            assert messages[-1]["role"] == "user"
    assert len(stored) == len(good) == len(many) - refused
    assert refused == 1
    for row, (number, messages, encoded) in enumerate(good):
        assert np.array_equal(stored.ids(row), encoded.ids)
        assert np.array_equal(stored.trained(row), encoded.trained)
        assert stored.place(row) == f"{tmp_path}/many.jsonl:{number}"
        assert stored.has_system[row] == (messages[0]["role"] == "system")
    assert stored.lengths.tolist() == [len(encoded.ids) for _, _, encoded in good]
    labels = [encoded.labels for _, _, encoded in good]
    assert stored.trained_tokens.tolist() == [sum(label != -100 for label in row) for row in labels]
    assert stored.first_trained.tolist() == [next(n for n, label in enumerate(row) if label != -100) for row in labels]
    systems = {messages[0]["content"] for _, messages, _ in good if messages[0]["role"] == "system"}
    assert stored.count_distinct_systems(np.arange(len(stored))) == len(systems)
    assert stored.count_distinct_systems(np.asarray([0])) == 0
    opened_by_datasets = datasets.Dataset.from_file(str(tmp_path / "rows.arrow"))
    assert opened_by_datasets[5]["input_ids"] == good[5][2].input_ids


def test_a_worker_that_dies_is_an_error_with_a_remedy(chatml_tokenizer, many, tmp_path: Path) -> None:
    class Dying(RowTokenizer):
        def encode_chunk(self, *_: object) -> None:  # type: ignore[override]
            import os
            import signal

            os.kill(os.getpid(), signal.SIGKILL)

    opened = open_source(Source(path=str(tmp_path / "many.jsonl")))
    with pytest.raises(UserError, match="processes: 1"):
        list(tokenize(Dying(chatml_tokenizer, "assistant"), opened.chunks(), "messages", 2))


def prepared(recipe: Path, *overrides: str):
    loaded = load_recipe(recipe, overrides)
    tokenizer = load_tokenizer(loaded.model)
    use_template(tokenizer, loaded.chat.template)
    return examine(loaded, tokenizer)


def test_where_fastokens_differs_the_tokenizer_is_used_and_the_report_says_so(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from train.data.fast_tokenizer import FastTokenizer

    first = prepared(recipe_file())
    assert first.caches[0].how == "fastokens, checked on a sample"
    calls = 0
    check = FastTokenizer.check

    def differs_later(self: FastTokenizer, texts: list[str]) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:  # the hard texts agree, the user's rows don't
            raise ShortcutError("fastokens gives other tokens for 'a row'")
        check(self, texts)

    monkeypatch.setattr(FastTokenizer, "check", differs_later)
    second = prepared(recipe_file(), f"data.cache_dir={tmp_path / 'other'}")
    assert second.caches[0].how == "the tokenizer itself, as fastokens gives other tokens for 'a row'"
    same = zip(first.train.dataset, second.train.dataset, strict=True)
    assert all(np.array_equal(first_row["input_ids"], second_row["input_ids"]) for first_row, second_row in same)


def test_changes_that_tokenize_again_and_changes_that_only_pack_again(
    recipe_file: Callable[..., Path], rows_file: Path, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    cache = f"data.cache_dir={tmp_path / 'cache'}"
    recipe = recipe_file()
    key = prepared(recipe, cache).caches[0].key

    def now(*overrides: str) -> tuple[bool, bool]:
        """Return whether the tokens were in the cache, and whether the key is that of before."""
        (cache_entry,) = prepared(recipe, cache, *overrides).caches
        return cache_entry.hit, cache_entry.key == key

    assert now() == (True, True)
    for unchanged in ("data.max_length=300", "seed=7", "data.packing=false", "data.validation=0.2",
                      "data.sources.0.weight=2.0", "data.overlong=drop", "data.on_bad_row=skip",
                      "training.learning_rate=1e-5"):  # fmt: skip
        assert now(unchanged) == (True, True), unchanged
    template = tmp_path / "own.jinja"
    chatml = Path("train/data/templates/chatml.jinja").read_text()
    template.write_text(chatml + "{# changed #}")
    for changed in ("chat.train_on=last", "chat.control_tokens_in_text=escape", f"chat.template={template}",
                    "data.sources.0.format=messages"):  # fmt: skip
        assert now(changed) == (False, False), changed
        assert now(changed) == (True, False), changed
    other_model = tmp_path / "other-model"
    shutil.copytree(tiny_model, other_model)
    assert now(f"model.name_or_path={other_model}") == (True, True)  # the same tokenizer in another place
    described = json.loads((other_model / "tokenizer.json").read_text())
    described["model"]["merges"].pop()
    (other_model / "tokenizer.json").write_text(json.dumps(described))
    assert now(f"model.name_or_path={other_model}") == (False, False)
    content = rows_file.read_bytes()
    rows_file.write_bytes(content.replace(b"river", b"rivet", 1))
    assert now() == (False, False)
    rows_file.write_bytes(content)
    assert now() == (True, True)
    moved = rows_file.rename(tmp_path / "moved.jsonl")
    assert now(f"data.sources.0.path={moved}") == (True, True)
    assert prepared(recipe, cache, f"data.sources.0.path={moved}").train.stats.longest_place.startswith(str(moved))


def test_a_source_that_changes_while_it_is_read_is_not_kept(
    recipe_file: Callable[..., Path], rows_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode_chunk = RowTokenizer.encode_chunk

    def meanwhile(self: RowTokenizer, *arguments: object):
        rows_file.write_bytes(rows_file.read_bytes().replace(b"river", b"rivet"))
        return encode_chunk(self, *arguments)

    monkeypatch.setattr(RowTokenizer, "encode_chunk", meanwhile)
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match=r"data\.sources\.0: .*changed while it was read"):
        prepared(recipe_file(), f"data.cache_dir={cache}")
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_a_cache_that_becomes_read_only_does_not_end_a_run(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = prepared(recipe_file())
    number, expected = len(data.train.dataset), [data.train.dataset[place] for place in range(len(data.train.dataset))]

    def full(*_: object) -> None:
        raise UserError("data.cache_dir: no space left")

    monkeypatch.setattr("train.data.splits.get_or_build", full)
    again = [data.train.dataset[number + place] for place in range(number)]  # the second epoch
    assert sum(len(row["input_ids"]) for row in again) == sum(len(row["input_ids"]) for row in expected)
