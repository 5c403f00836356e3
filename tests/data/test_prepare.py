"""Prepared data: the statistics of each split, recounted from the file and the tokenizer in plain Python."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from train.data.chat.template import use_template
from train.data.prepare import examine, prepare
from train.data.prepared_data import PreparedData
from train.data.stats import choose_examples, histogram, percentiles
from train.errors import UserError
from train.model.tokenizer import load_tokenizer
from train.recipe import ModelSection, load_recipe


def examined(path: Path) -> PreparedData:
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    return examine(recipe, tokenizer)


def rows_of(path: Path) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


def chatml(messages: list[dict]) -> list[tuple[str, bool]]:
    """Return a row's text in ChatML, in parts that are trained or not, without a template."""
    parts = []
    for message in messages:
        parts.append((f"<|im_start|>{message['role']}\n", False))
        parts.append((f"{message['content']}<|im_end|>", message["role"] == "assistant"))
        parts.append(("\n", False))
    return parts


@pytest.fixture
def count(tiny_model: Path) -> Callable[[list[dict]], tuple[int, int]]:
    """Counts tokens and trained tokens of a row, each part tokenized alone."""
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_model)))

    def tokens(messages: list[dict]) -> tuple[int, int]:
        lengths = [(len(tokenizer(text).input_ids), trained) for text, trained in chatml(messages)]
        return sum(length for length, _ in lengths), sum(length for length, trained in lengths if trained)

    return tokens


def test_the_statistics_are_those_of_a_plain_count(
    recipe_file: Callable[..., Path], rows_file: Path, count: Callable
) -> None:
    data = examined(recipe_file())
    stats, rows = data.train.stats, rows_of(rows_file)
    counts = [count(row) for row in rows]
    assert stats.rows == stats.conversations == len(rows)
    assert stats.lengths.tolist() == [length for length, _ in counts]
    assert stats.lengths.dtype == np.int32
    assert stats.tokens == sum(length for length, _ in counts)
    assert stats.trained_tokens == sum(trained for _, trained in counts)
    longest = max(range(len(rows)), key=lambda row: counts[row][0])
    assert (stats.longest, stats.longest_place) == (counts[longest][0], f"{rows_file}:{longest + 1}")
    systems = [message["content"] for row in rows for message in row if message["role"] == "system"]
    assert stats.rows_with_system == len(systems)
    assert stats.distinct_systems == len(set(systems))
    assert stats.documents_per_sequence.tolist() == [len(row["seq_lengths"]) for row in data.train.dataset]
    assert sum(len(row["input_ids"]) for row in data.train.dataset) == stats.tokens
    assert all(sum(row["seq_lengths"]) == len(row["input_ids"]) == len(row["labels"]) for row in data.train.dataset)


@pytest.mark.parametrize(("overlong", "outcome"), [("error", "refused"), ("drop", "dropped"), ("truncate", None)])
def test_overlong_rows_are_counted_as_refused_dropped_or_truncated(
    overlong: str, outcome: str | None, recipe_file: Callable[..., Path], rows_file: Path, count: Callable
) -> None:
    most = 60
    stats = examined(recipe_file(data={"max_length": most, "overlong": overlong})).train.stats
    rows = rows_of(rows_file)
    longer = [(number, *count(row)) for number, row in enumerate(rows, 1) if count(row)[0] > most]
    assert len(longer) >= 3
    if outcome:
        expected = {outcome: [number for number, *_ in longer]}
        lost_tokens = sum(length for _, length, _ in longer)
    else:  # a row of which no trained token is left is dropped
        ends = [(number, length, length - trained - 1) for number, length, trained in longer]  # one "\n" at the end
        expected = {
            "truncated": [number for number, _, prompt in ends if prompt < most],
            "dropped": [number for number, _, prompt in ends if prompt >= most],
        }
        lost_tokens = sum(length - most if prompt < most else length for _, length, prompt in ends)
    counted = {name: bad.count for name, bad in stats.overlong.items()}
    assert counted == {name: len(numbers) for name, numbers in expected.items() if numbers}
    for name, bad in stats.overlong.items():
        assert [example.place for example in bad.examples] == [f"{rows_file}:{n}" for n in expected[name][:3]]
    assert stats.overlong_tokens == lost_tokens
    assert stats.rows == len(rows) - sum(len(numbers) for name, numbers in expected.items() if name != "truncated")


def test_all_row_errors_are_in_one_message(recipe_file: Callable[..., Path], rows_file: Path) -> None:
    lines = rows_file.read_text().splitlines()
    lines[2] = "{no json"
    lines[4] = json.dumps({"messages": [{"role": "user", "content": "no answer"}]})
    lines[6] = json.dumps({"messages": [{"role": role, "content": "x"} for role in ("user", "tool", "assistant")]})
    rows_file.write_text("\n".join(lines))
    recipe = load_recipe(recipe_file(data={"max_length": 100}))
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    with pytest.raises(UserError) as refused:
        prepare(recipe, tokenizer)
    error = str(refused.value)
    for word in ("jsonl:3", "jsonl:5", "jsonl:7", "invalid JSON", "no assistant turn", "on_bad_row: skip"):
        assert word in error
    assert "rows have more tokens than data.max_length (100)" in error
    assert "data.overlong: drop" in error
    assert "\n" not in error


def test_a_split_without_rows_is_an_error_and_not_a_crash(recipe_file: Callable[..., Path]) -> None:
    data = examined(recipe_file(data={"max_length": 8, "overlong": "drop"}))
    assert (data.train.stats.rows, data.train.stats.sequences, len(data.train.dataset)) == (0, 0, 0)
    assert data.train.stats.examples == []


def test_duplicates_and_overlap_are_found_with_their_places(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    def write(name: str, *rows: tuple[str, str, str]) -> str:
        keys = ("system", "prompt", "output")
        path = tmp_path / name
        path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
        return str(path)

    first = ("", "q", "a"), ("", "r", "a"), ("", "q", "a"), ("be brief", "q", "a")
    train, held = write("f.jsonl", *first), write("v.jsonl", ("", "new", "a"), ("", " q ", "b"), ("", "r", "a"))
    data = examined(recipe_file(data={"sources": [{"path": train, "weight": 2.0}], "validation": [{"path": held}]}))
    assert data.train.stats.rows == 8
    duplicates = data.train.stats.duplicates  # a weight of 2.0 makes none
    assert (duplicates.rows, duplicates.example) == (1, (f"{train}:1", f"{train}:3"))
    overlap = data.overlap
    assert (overlap.questions.rows, overlap.questions.example) == (2, (f"{train}:1", f"{held}:2"))
    assert (overlap.conversations.rows, overlap.conversations.example) == (1, (f"{train}:2", f"{held}:3"))
    twice = examined(recipe_file(data={"sources": [{"path": train}, {"path": train, "split": "train"}]}))
    assert twice.train.stats.duplicates.rows == 5


def test_percentiles_are_lengths_that_occur() -> None:
    lengths = [int(value) for value in np.random.default_rng(0).lognormal(5, 1, 997)]
    ordered = sorted(lengths)
    expected = {str(q): ordered[max(math.ceil(q * 997 / 100), 1) - 1] for q in (0, 5, 25, 50, 75, 95, 99, 100)}
    assert percentiles(np.asarray(lengths, np.int32)) == expected


@pytest.mark.parametrize(
    "lengths", [[7], [5, 5, 5], list(range(80, 120)), [10] * 500 + [9_999], [3, 10, 200, 40_000], [99] * 99 + [100]]
)
def test_every_row_is_in_one_bar(lengths: list[int]) -> None:
    bins = histogram(np.asarray(lengths, np.int32))
    counted = Counter(next(n for n, bin in enumerate(bins) if bin.start <= length < bin.end) for length in lengths)
    assert [bin.rows for bin in bins] == [counted[n] for n in range(len(bins))]
    assert [bin.end for bin in bins[:-1]] == [bin.start for bin in bins[1:]]
    assert len(bins) <= 13


def test_examples_show_both_kinds_and_are_seeded() -> None:
    kinds = [True] * 500
    kinds[77] = False
    for seed in range(20):
        chosen = choose_examples(kinds, seed)
        assert 77 in chosen
        assert len(set(chosen)) == 5
        assert chosen == choose_examples(kinds, seed)
    assert len({tuple(choose_examples(kinds, seed)) for seed in range(20)}) > 15
    assert choose_examples([True, False], 0) == [0, 1]
    assert choose_examples([], 0) == []


def test_examples_repeat_no_row_and_show_any_part_of_a_split_conversation(
    recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if loop.last or m.role == 'user' %}"
    template = tmp_path / "split.jinja"  # only the last answer has its end token, so each needs a row of its own
    template.write_text(
        chatml + "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(6) for role in ("user", "assistant")]
    path = tmp_path / "turns.jsonl"
    path.write_text((json.dumps({"messages": turns}) + "\n") * 3 + json.dumps({"messages": turns[:2]}) + "\n")
    data = {"sources": [{"path": str(path)}]}
    stats = examined(recipe_file(chat={"template": str(template)}, data=data)).train.stats
    assert (stats.conversations, stats.rows) == (4, 19)
    assert sorted(row.place for row in stats.examples) == [f"{path}:1", f"{path}:4"]
    seeds = range(8)
    preview = {
        len(row.input_ids)
        for seed in seeds
        for row in examined(recipe_file(chat={"template": str(template)}, data=data, seed=seed)).train.stats.examples
        if row.place == f"{path}:1"
    }
    assert len(preview) > 2
