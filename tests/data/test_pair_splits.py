"""Splits of pairs: their statistics recounted from the file in plain Python; lengths, errors, weights, validation."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_words import WORDS

from train.data.chat.template import use_template
from train.data.diagnostics import find_data_warnings, find_dropped_rows
from train.data.loss_mask import NOT_TRAINED
from train.data.prepare import examine, prepare
from train.data.prepared_data import PreparedData
from train.errors import UserError
from train.model.tokenizer import load_tokenizer
from train.recipe import ModelSection, load_recipe
from train.system_gain.validation_rows import load_gain_rows

MAX_LENGTH = 80


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """30 pairs of 15 instructions, some without a system message, some longer than MAX_LENGTH in one half."""
    rng = random.Random(11)
    text = lambda least, most: " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(least, most)))  # noqa: E731
    return [
        {
            "system": text(1, 8) if number % 3 else "",
            "prompt": f"river {number // 2}",
            "chosen": text(70, 100) if number % 5 == 1 else text(1, 12),
            "rejected": text(70, 100) if number % 7 == 2 else text(1, 12),
        }
        for number in range(30)
    ]


@pytest.fixture
def write(tmp_path: Path, recipe_file: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes pairs, and a recipe of preference training on them."""

    def run(rows: list[dict], **data) -> Path:
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return recipe_file(data={"sources": [{"path": str(path)}], **data}, preference={"loss": "dpo"})

    return run


def examined(path: Path, read: Callable = examine) -> PreparedData:
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    return read(recipe, tokenizer)


@pytest.fixture
def halves(tiny_model: Path) -> Callable[[dict[str, str]], list[tuple[list[int], list[int]]]]:
    """Ids and labels of both halves of a row in ChatML, each part tokenized alone, without a template."""
    tokenizer = load_tokenizer(ModelSection(name_or_path=str(tiny_model)))

    def tokens(row: dict[str, str]) -> list[tuple[list[int], list[int]]]:
        turns = [("system", row["system"])] if row["system"] else []
        turns.append(("user", row["prompt"]))
        result = []
        for half in ("chosen", "rejected"):
            text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
            before = tokenizer(f"{text}<|im_start|>assistant\n").input_ids
            answer, after = (tokenizer(part).input_ids for part in (f"{row[half]}<|im_end|>", "\n"))
            labels = [NOT_TRAINED] * len(before) + answer + [NOT_TRAINED] * len(after)
            result.append(([*before, *answer, *after], labels))
        return result

    return tokens


def trained(labels: list[int]) -> int:
    return sum(label != NOT_TRAINED for label in labels)


def test_the_tokens_and_counts_are_those_of_a_plain_loop(
    rows: list[dict[str, str]], write: Callable[..., Path], halves: Callable
) -> None:
    data = examined(write(rows))
    stats, dataset, expected = data.train.stats, data.train.dataset, [halves(row) for row in rows]
    for number, pair in enumerate(expected):
        assert [(ids.tolist(), labels.tolist()) for ids, labels in dataset.pair(number)] == pair
    assert stats.rows == stats.conversations == len(rows)
    assert stats.tokens == sum(len(ids) for pair in expected for ids, _ in pair)
    assert stats.trained_tokens == sum(trained(labels) for pair in expected for _, labels in pair)
    assert stats.lengths.tolist() == [max(len(ids) for ids, _ in pair) for pair in expected]
    assert stats.rows_with_system == sum(bool(row["system"]) for row in rows)
    assert stats.distinct_systems == len({row["system"] for row in rows} - {""})
    answers = [[trained(labels) for _, labels in pair] for pair in expected]
    assert stats.pairs is not None
    assert (stats.pairs.chosen_tokens, stats.pairs.rejected_tokens) == tuple(map(sum, zip(*answers, strict=True)))
    assert stats.pairs.chosen_longer == sum(chosen > rejected for chosen, rejected in answers)
    assert stats.pairs.rejected_longer == sum(chosen < rejected for chosen, rejected in answers)
    assert (stats.pairs.siblings, stats.pairs.contradictory.rows, data.left_out) == (0, 0, [])
    assert stats.capacity == 2 * 512
    assert stats.documents_per_sequence.tolist() == [len(item["pairs"]) for item in dataset]
    assert sum(len(item["input_ids"]) for item in dataset) == stats.tokens


@pytest.mark.parametrize("overlong", ["error", "drop", "truncate"])
def test_the_longer_half_decides_on_a_pair(
    overlong: str, rows: list[dict[str, str]], write: Callable[..., Path], halves: Callable
) -> None:
    rows[4]["prompt"] = f"river 2 {' stone' * 100}"  # nothing of its answers is left
    data = examined(write(rows, max_length=MAX_LENGTH, overlong=overlong))
    stats, dataset = data.train.stats, data.train.dataset
    expected, dropped, cut = [], [], []
    for number, row in enumerate(rows):
        pair = halves(row)
        if max(len(ids) for ids, _ in pair) > MAX_LENGTH:
            shortened = [(ids[:MAX_LENGTH], labels[:MAX_LENGTH]) for ids, labels in pair]
            if overlong != "truncate" or not all(trained(labels) for _, labels in shortened):
                dropped.append(number)
                continue
            pair = shortened
            cut.append(number)
        expected.append(pair)
    assert len(dropped) + len(cut) >= 8
    kept = [[(ids.tolist(), labels.tolist()) for ids, labels in dataset.pair(number)] for number in range(stats.rows)]
    assert kept == expected
    assert stats.trained_tokens == sum(trained(labels) for pair in expected for _, labels in pair)
    name = "refused" if overlong == "error" else "dropped"
    assert {outcome: bad.count for outcome, bad in stats.overlong.items()} == {
        outcome: len(numbers) for outcome, numbers in ((name, dropped), ("truncated", cut)) if numbers
    }
    total = sum(len(ids) for row in rows for ids, _ in halves(row))
    assert stats.overlong_tokens == total - stats.tokens
    assert max(len(item["input_ids"]) for item in dataset) <= 2 * MAX_LENGTH
    groups = find_dropped_rows(data, load_recipe(write(rows, max_length=MAX_LENGTH)).data)
    assert f"training pairs with a half over {MAX_LENGTH} tokens" in {group.reason for group in groups}
    if overlong == "error":
        with pytest.raises(UserError, match=r"training pairs have a half with more tokens than data.max_length"):
            examined(write(rows, max_length=MAX_LENGTH), prepare)


def test_pairs_that_differ_behind_the_cut_alone_are_dropped_and_counted(
    rows: list[dict[str, str]], write: Callable[..., Path]
) -> None:
    same = " ".join(["stone"] * 90)
    for number in (4, 20):
        rows[number] |= {"chosen": f"{same} river", "rejected": f"{same} stone"}
    rows[5] |= {"chosen": f"river {same}", "rejected": f"stone {same}"}  # differ before it
    path = write(rows, max_length=MAX_LENGTH, overlong="truncate")
    data = examined(path)
    stats, places = data.train.stats, [bad.place.rpartition(":")[2] for bad in data.train.stats.same_when_cut.examples]
    assert (stats.same_when_cut.count, places) == (2, ["5", "21"])
    assert stats.rows == stats.conversations - 2 - sum(
        bad.count for name, bad in stats.overlong.items() if name == "dropped"
    )
    groups = {group.reason: group.rows for group in find_dropped_rows(data, load_recipe(path).data)}
    assert groups[f"training pairs whose halves are the same within {MAX_LENGTH} tokens"] == 2
    dropped = examined(write(rows, max_length=MAX_LENGTH, overlong="drop"))
    assert dropped.train.stats.same_when_cut.count == 0


def test_identical_answers_are_counted_as_errors_of_their_own_kind(
    rows: list[dict[str, str]], write: Callable[..., Path]
) -> None:
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[9]["rejected"] = rows[9]["chosen"]
    data = examined(write(rows))
    (bad,) = data.errors.values()
    assert [*data.errors] == ["identical answers"]
    assert (bad.count, bad.examples[0].place.endswith("pairs.jsonl:4")) == (2, True)
    assert data.train.stats.rows == len(rows) - 2
    with pytest.raises(UserError, match=r"2 identical answers: .*on_bad_row: skip"):
        examined(write(rows), prepare)
    assert examined(write(rows, on_bad_row="skip"), prepare).train.stats.rows == len(rows) - 2


def test_contradictory_and_equal_pairs_are_warnings(rows: list[dict[str, str]], write: Callable[..., Path]) -> None:
    rows.append({**rows[5], "chosen": rows[5]["rejected"], "rejected": rows[5]["chosen"]})
    rows.append({**rows[8], "system": "other", "chosen": rows[8]["rejected"], "rejected": rows[8]["chosen"]})
    rows.append(rows[2])
    data = examined(write(rows, sources=[{"path": str(write(rows).parent / "pairs.jsonl"), "weight": 2.0}]))
    assert data.train.stats.pairs is not None
    contradictory, duplicates = data.train.stats.pairs.contradictory, data.train.stats.duplicates
    place = lambda line: f"{write(rows).parent / 'pairs.jsonl'}:{line}"  # noqa: E731
    assert (contradictory.rows, set(contradictory.example or ())) == (2, {place(6), place(31)})
    assert (duplicates.rows, duplicates.example) == (1, (place(3), place(33)))
    warnings = " ".join(find_data_warnings(data))
    assert "2 training pairs contradict another: under the same prompt" in warnings
    assert "1 training pair is an exact duplicate of another" in warnings


def test_a_share_holds_out_instructions_whatever_their_system_message(
    rows: list[dict[str, str]], write: Callable[..., Path]
) -> None:
    data = examined(write(rows, validation=0.2))
    assert data.validation is not None
    prompts = []
    for split in (data.train, data.validation):
        lines = {
            int(place.rpartition(":")[2]) for at in range(len(split.dataset)) for place in split.dataset.places(at)
        }
        prompts.append({rows[line - 1]["prompt"] for line in lines})
    assert prompts[0].isdisjoint(prompts[1])
    assert sum(map(len, prompts)) == 15
    assert data.validation.stats.rows == 6
    gain = load_gain_rows(load_recipe(write(rows, validation=0.2)), data, load_tokenizer_of(write(rows)))
    assert gain is not None
    chosen = {f"{row['chosen']}<|im_end|>" for row in rows if row["prompt"] in prompts[1] and row["system"]}
    tokenizer = load_tokenizer_of(write(rows))
    measured = {tokenizer.decode([label for label in row.own[0].labels if label >= 0]) for row in gain.rows}
    assert measured
    assert measured <= chosen


def load_tokenizer_of(path: Path):
    recipe = load_recipe(path)
    tokenizer = load_tokenizer(recipe.model)
    use_template(tokenizer, recipe.chat.template)
    return tokenizer


@pytest.mark.parametrize("key", ["row", "message"])
def test_loss_weights_are_refused(key: str, rows: list[dict[str, str]], write: Callable[..., Path]) -> None:
    answer = {"role": "assistant", "content": "amber", **({"weight": 0.5} if key == "message" else {})}
    weighted = {"prompt": "river", "chosen": [answer], "rejected": "stone"} | (
        {"loss_weight": 2.0} if key == "row" else {}
    )
    with pytest.raises(
        UserError, match=r"1 of 31 training pairs have a loss weight .* the losses of pairs have no weights"
    ):
        examined(write([*rows, weighted]), prepare)


def test_the_modes_have_cache_entries_of_their_own(
    rows: list[dict[str, str]], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [(row["system"] or "none", row["prompt"], row["chosen"]) for row in rows]
    path.write_text(
        "".join(json.dumps(dict(zip(("system", "prompt", "output"), row, strict=True))) + "\n" for row in turns)
    )
    data = {"sources": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache")}
    single = examined(recipe_file(data=data))
    pairs = examined(recipe_file(data=data, preference={"loss": "dpo", "pairs": "all"}))
    again = examined(recipe_file(data=data))
    assert single.caches[0].key == again.caches[0].key != pairs.caches[0].key
    assert (single.caches[0].hit, pairs.caches[0].hit, again.caches[0].hit) == (False, False, True)
    assert single.caches[0].tokens == pairs.caches[0].tokens
    assert np.array_equal(single.train.dataset[0]["input_ids"], again.train.dataset[0]["input_ids"])


def test_sources_of_both_kinds_are_trained_together(
    rows: list[dict[str, str]], write: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    texts = [("amber", "stone", "cloud"), ("maple", "stone", "seven"), ("maple", "north", "seven")]
    path.write_text(
        "".join(json.dumps(dict(zip(("system", "prompt", "output"), row, strict=True))) + "\n" for row in texts)
    )
    pairs = write(rows).parent / "pairs.jsonl"
    data = examined(write(rows, sources=[{"path": str(pairs)}, {"path": str(path)}]))
    assert data.train.dataset.rows_by_source == {"pairs": 30, "rows": 2}
    assert data.train.stats.pairs is not None
    assert data.train.stats.pairs.siblings == 2
    assert [(source.key, source.rows) for source in data.left_out] == [("data.sources.1", 3)]
    for item in data.train.dataset:
        sources = data.train.dataset.sources(item["sequence"]).tolist()
        assert sources == [int(number >= 30) for number in item["pairs"] for _ in range(2)]
