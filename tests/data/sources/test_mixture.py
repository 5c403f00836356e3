"""Mixture: weights and held-out rows, read back from the tokens that are trained."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_source import GOOD, ROWS, lines, pair, write

from train.errors import UserError

Load = Callable[..., Any]


def test_multifaceted_rows_become_conversations(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "rows.jsonl", lines(ROWS))
    loaded = load(path)
    assert [turn["content"] for turn in loaded.train[0].messages] == list(ROWS[0].values())
    assert [[turn["role"] for turn in row.messages] for row in loaded.train] == [
        ["system", "user", "assistant"],
        ["user", "assistant"],  # its system message is empty
        ["system", "user", "assistant"],
    ]
    assert [row.place for row in loaded.train] == [f"{path}:{line}" for line in (1, 2, 3)]
    assert (loaded.validation, loaded.errors) == ([], {})


def test_sources_of_several_formats(tmp_path: Path, load: Load) -> None:
    write(tmp_path / "a.jsonl", lines([pair("a")]))
    turns = [{"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]
    write(tmp_path / "b.jsonl", lines([{"conversations": turns}] * 2))
    loaded = load("", sources=[{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.jsonl")])
    assert [row.messages[-1]["content"] for row in loaded.train] == ["a", "c", "c"]
    assert [row.place for row in loaded.train] == [
        f"{tmp_path}/{place}" for place in ("a.jsonl:1", "b.jsonl:1", "b.jsonl:2")
    ]


def test_a_format_in_the_recipe_overrides_detection(tmp_path: Path, load: Load) -> None:
    row = {"messages": "unused notes", "instruction": "i", "output": "o"}
    path = write(tmp_path / "rows.jsonl", lines([row]))
    loaded = load("", sources=[{"path": str(path), "format": "alpaca"}])
    assert [turn["content"] for turn in loaded.train[0].messages] == ["i", "o"]


def mixed(load: Load, tmp_path: Path, weights: dict[str, float], seed: int = 0) -> Counter[str]:
    """Count how often each question of sources of ten rows is trained."""
    for name in weights:
        write(tmp_path / f"{name}.jsonl", lines([pair(f"{name}{row}") for row in range(10)]))
    sources = [{"path": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in weights.items()]
    loaded = load("", sources=sources, seed=seed)
    return Counter(row.messages[1]["content"] for row in loaded.train)


def test_weights_decide_how_often_a_row_is_seen(tmp_path: Path, load: Load) -> None:
    assert Counter(mixed(load, tmp_path, {"a": 1.0}).values()) == {1: 10}
    assert Counter(mixed(load, tmp_path, {"a": 0.3}).values()) == {1: 3}
    assert Counter(mixed(load, tmp_path, {"a": 2.0}).values()) == {2: 10}
    assert Counter(mixed(load, tmp_path, {"a": 2.5}).values()) == {2: 5, 3: 5}


def test_samples_follow_the_seed_and_no_other_source(tmp_path: Path, load: Load) -> None:
    alone = mixed(load, tmp_path, {"a": 0.5})
    assert mixed(load, tmp_path, {"a": 0.5}) == alone
    together = mixed(load, tmp_path, {"b": 0.4, "a": 0.5, "c": 3.0})
    assert Counter({name: count for name, count in together.items() if name.startswith("a")}) == alone
    assert any(mixed(load, tmp_path, {"a": 0.5}, seed) != alone for seed in range(1, 5))


def janus_like(tmp_path: Path, questions: int) -> Path:
    rows = [pair(f"question {row % questions}", f"answer {row}", f"system {row}") for row in range(3 * questions)]
    return write(tmp_path / "janus.jsonl", lines(rows))


def questions_of(rows: list[Any]) -> list[str]:
    return [row.messages[1]["content"] for row in rows]


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_a_question_is_never_in_both_splits(share: float, tmp_path: Path, load: Load) -> None:
    path = janus_like(tmp_path, 40)
    loaded = load(path, validation=share, seed=3)
    trained, held = questions_of(loaded.train), questions_of(loaded.validation)
    assert not set(trained) & set(held)
    assert sorted(row.place for row in loaded.train + loaded.validation) == sorted(f"{path}:{n}" for n in range(1, 121))
    assert set(Counter(held).values()) == {3}
    assert abs(len(held) - share * 120) <= 3
    again = load(path, validation=share, seed=3)
    assert again == loaded
    assert load(path, validation=share, seed=4).validation != loaded.validation


def test_a_question_in_two_sources_or_with_other_blanks_is_held_out_as_one(tmp_path: Path, load: Load) -> None:
    path = janus_like(tmp_path, 12)
    rows = [pair(f" question\n{row}", "b", "") for row in range(12)]
    other = write(tmp_path / "other.jsonl", lines(rows))
    sources = [{"path": str(path), "weight": 2.0}, {"path": str(other)}]
    loaded = load("", sources=sources, validation=0.25, seed=0)
    texts = [{" ".join(turn["content"].split()) for row in part for turn in row.messages if turn["role"] == "user"}
             for part in (loaded.train, loaded.validation)]  # fmt: skip
    assert not texts[0] & texts[1]
    assert len(texts[1]) == 3
    assert len(loaded.validation) == 12  # each held row once, whatever its source's weight
    assert len(loaded.train) == 2 * 27 + 9


def test_adding_a_source_keeps_most_of_what_is_held_out(tmp_path: Path, load: Load) -> None:
    path = janus_like(tmp_path, 100)
    more = write(tmp_path / "more.jsonl", lines([pair(f"more {row}") for row in range(30)]))
    before = set(questions_of(load(path, validation=0.2, seed=0).validation))
    sources = [{"path": str(more)}, {"path": str(path)}]
    after = set(questions_of(load("", sources=sources, validation=0.2, seed=0).validation))
    assert len(before & after) >= 0.8 * len(before)


def test_groups_larger_than_the_share_leave_the_smallest_held_out(tmp_path: Path, load: Load) -> None:
    rows = [pair("many")] * 9 + [pair("few")] * 5
    loaded = load(write(tmp_path / "rows.jsonl", lines(rows)), validation=0.01, seed=0)
    assert questions_of(loaded.validation) == ["few"] * 5


def test_validation_sources_of_their_own(tmp_path: Path, load: Load) -> None:
    path = janus_like(tmp_path, 4)
    held = write(tmp_path / "held.jsonl", lines([pair("h", "i"), pair("j", "k")]))
    loaded = load(path, validation=[{"path": str(held)}], seed=0)
    assert (len(loaded.train), questions_of(loaded.validation)) == (12, ["h", "j"])


def test_a_weight_that_leaves_nothing_and_a_share_that_can_not_be(tmp_path: Path, load: Load) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD * 3)
    with pytest.raises(UserError, match=r"data\.sources\.0\.weight: 0\.1 of 3 rows leaves no row"):
        load("", sources=[{"path": str(path), "weight": 0.1}])
    with pytest.raises(UserError, match="every row begins with the same user message"):
        load(path, validation=0.5, seed=0)


def test_a_source_without_a_good_row_is_an_error_even_when_skipping(tmp_path: Path, load: Load) -> None:
    good = write(tmp_path / "good.jsonl", GOOD)
    bad = write(tmp_path / "bad.jsonl", lines([pair(answer="")]))
    for keys, key in (({"sources": [{"path": str(good)}, {"path": str(bad)}]}, "data.sources.1"),
                      ({"validation": [{"path": str(bad)}]}, "data.validation.0")):  # fmt: skip
        with pytest.raises(UserError, match=f"{key}: no row of .*bad.jsonl can be trained"):
            load(good, **keys, on_bad_row="skip", seed=0)
