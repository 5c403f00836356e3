"""Pairs of siblings: found by a plain loop over the rows, and tokens of the complete conversations under many templates."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from chat_templates import INLINE, TRL_TEMPLATES
from tiny_words import WORDS

from train.data.chat.system_role import apply_system_role
from train.data.chat.template import use_template
from train.data.diagnostics import find_dropped_rows
from train.data.loss_mask import encode
from train.data.prepare import examine, prepare
from train.data.prepared_data import PreparedData
from train.data.siblings import ALONE, SAME_ANSWER
from train.errors import UserError
from train.model.tokenizer import load_tokenizer
from train.recipe import load_recipe

CASES = [
    *(
        ("SmolLM2", name, "native")
        for name in ("chatml", "chatml-tools", "qwen3_training", "qwen3_instruct_2507_training")
    ),
    *(
        (model, name, "native")
        for model in ("SmolLM2", "Mistral")
        for name in ("mistral v3", "mistral v7", "llama 2", "mistral-system")
    ),
    *(("SmolLM2", "chatml", system_role) for system_role in ("merge_into_user", "turn")),
]
"""Tokenizer, template and `chat.system_role`. Mistral's v3 writes the system message into the last user turn."""


@pytest.fixture
def rows() -> list[dict[str, str]]:
    """Rows of Janus: 12 instructions under one to four messages, with two siblings that can't be paired."""
    rng = random.Random(5)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(rng.randint(1, count)))  # noqa: E731
    rows = [
        {"system": f"{text(20)} {number} {sibling}", "prompt": f"{text(30)} {number}", "output": text(40)}
        for number in range(12)
        for sibling in range(1 + number % 4)
    ]
    for row in rows:
        row["prompt"] = next(
            other["prompt"] for other in rows if other["system"].split()[-2] == row["system"].split()[-2]
        )
    rows[12]["output"] = rows[11]["output"]  # the same answer under both messages of an instruction
    rows.append({**rows[1], "output": "amber"})  # another answer under the same message
    rng.shuffle(rows)
    return rows


@pytest.fixture
def examined(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., PreparedData]:
    """Return a function that writes rows to a file and examines them, with keys of the recipe."""

    def run(rows: list[dict], pairs: str = "all", *, strict: bool = False, **sections) -> PreparedData:
        path = tmp_path / "siblings.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = {"sources": [{"path": str(path)}], **sections.pop("data", {})}
        recipe = load_recipe(recipe_file(data=data, preference={"loss": "dpo", "pairs": pairs}, **sections))
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        return (prepare if strict else examine)(recipe, tokenizer)

    return run


def pairs_by_hand(rows: list[dict[str, str]]) -> set[tuple[int, int]]:
    """Lines of the chosen and the rejected answer of every pair."""
    return {
        (own, other)
        for own, row in enumerate(rows, 1)
        for other, sibling in enumerate(rows, 1)
        if row["prompt"] == sibling["prompt"]
        and row["system"] != sibling["system"]
        and row["output"] != sibling["output"]
    }


def pairs_of(data: PreparedData) -> list[tuple[int, int]]:
    """Lines of the chosen and the rejected answer of each pair of the training split, in the order of the numbers."""
    dataset, lines = data.train.dataset, {}
    for item in dataset:
        places = [int(place.rpartition(":")[2]) for place in dataset.places(item["sequence"])]
        lines.update(zip(item["pairs"].tolist(), zip(places[::2], places[1::2], strict=True), strict=True))
    return [lines[number] for number in range(len(dataset.lengths))]


def test_all_pairs_are_those_of_a_plain_loop(rows: list[dict[str, str]], examined: Callable[..., PreparedData]) -> None:
    data = examined(rows)
    expected = pairs_by_hand(rows)
    assert Counter(pairs_of(data)) == Counter(expected)
    assert len(expected) > 40
    assert {(other, own) for own, other in expected} == expected  # symmetric
    assert data.train.stats.pairs.siblings == data.train.stats.rows == len(expected)
    (unpaired,) = data.left_out
    alone = [row for row in rows if not [other for other in rows if is_sibling(row, other)]]
    own_answers = {own for own, _ in expected}
    assert unpaired.rows == len(rows)
    assert {reason: bad.count for reason, bad in unpaired.reasons.items()} == {
        ALONE: len(alone),
        SAME_ANSWER: len(rows) - len(own_answers) - len(alone),
    }


def is_sibling(row: dict[str, str], other: dict[str, str]) -> bool:
    return row["prompt"] == other["prompt"] and row["system"] != other["system"]


def test_one_pair_has_each_row_once_as_the_chosen_one_with_a_sibling_drawn_by_the_seed(
    rows: list[dict[str, str]], examined: Callable[..., PreparedData]
) -> None:
    expected = pairs_by_hand(rows)
    drawn = pairs_of(examined(rows, "one"))
    assert Counter(own for own, _ in drawn) == Counter({own for own, _ in expected})
    assert set(drawn) <= expected
    distinct = [row for row in rows if row["system"].split()[-2] not in ("1", "5")]
    assert len({row["output"] for row in distinct}) == len({row["system"] for row in distinct}) == len(distinct)
    rejected = Counter(other for _, other in pairs_of(examined(distinct, "one")))
    assert set(rejected.values()) == {1}  # each answer is chosen once and rejected once
    assert pairs_of(examined(rows, "one")) == drawn
    assert pairs_of(examined(rows, "one", seed=7)) != drawn
    moved = [*rows[10:], *rows[:10]]  # the draw depends on the rows, not on their order
    lines = {old: moved.index(row) + 1 for old, row in enumerate(rows, 1)}
    assert sorted(pairs_of(examined(moved, "one"))) == sorted((lines[own], lines[other]) for own, other in drawn)


@pytest.mark.parametrize(("model", "template", "system_role"), CASES)
def test_joined_tokens_are_those_of_the_complete_conversation(
    model: str,
    template: str,
    system_role: str,
    rows: list[dict[str, str]],
    tokenizer,
    mistral_tokenizer_v1,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """SmolLM2's pre-tokenizer joins blanks and digits with what follows them; SentencePiece any text."""
    if model == "Mistral":
        tokenizer = mistral_tokenizer_v1()
    for row in rows[::2]:
        row["output"] = f" 12{row['output']}\n"
    expected = len(pairs_by_hand(rows))
    path, template_file = tmp_path / "siblings.jsonl", tmp_path / "template.jinja"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if template in INLINE or (TRL_TEMPLATES / f"{template}.jinja").exists():
        template_file.write_text(INLINE.get(template) or (TRL_TEMPLATES / f"{template}.jinja").read_text())
        template = str(template_file)
    data = {"sources": [{"path": str(path)}], "cache_dir": str(tmp_path / "cache")}
    recipe = load_recipe(recipe_file(data=data, preference={"loss": "dpo", "pairs": "all"}))
    use_template(tokenizer, template)
    apply_system_role(tokenizer, system_role)
    data = examine(recipe, tokenizer)
    assert len(data.train.dataset.lengths) == expected > 40
    for number, (own, other) in enumerate(pairs_of(data)):
        for line, (ids, labels) in zip((own, other), data.train.dataset.pair(number), strict=True):
            texts = {"system": rows[own - 1]["system"], "user": rows[own - 1]["prompt"]}
            texts["assistant"] = rows[line - 1]["output"]
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            (whole,) = encode(tokenizer, messages)
            assert (ids.tolist(), labels.tolist()) == (whole.input_ids, whole.labels)
            if model == "SmolLM2":
                text = tokenizer.apply_chat_template(messages, tokenize=False)
                assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_an_answer_whose_tokens_depend_on_the_prompt_is_an_error(
    rows: list[dict[str, str]], examined: Callable[..., PreparedData], tmp_path: Path
) -> None:
    template = tmp_path / "depends.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{{ messages[0].content | length }} {% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(UserError, match=r"data.sources.0: rows can't be paired with their siblings.*chosen.*rejected"):
        examined(rows, chat={"template": str(template)})


def test_siblings_are_on_one_side_of_a_validation_share(
    rows: list[dict[str, str]], examined: Callable[..., PreparedData]
) -> None:
    data = examined(rows, data={"validation": 0.3})
    assert data.validation is not None
    sides = []
    for split in (data.train, data.validation):
        places = {place for sequence in range(len(split.dataset)) for place in split.dataset.places(sequence)}
        sides.append({rows[int(place.rpartition(":")[2]) - 1]["prompt"] for place in places})
    assert sides[0]
    assert sides[1]
    assert sides[0].isdisjoint(sides[1])
    assert data.train.stats.rows + data.validation.stats.rows == len(pairs_by_hand(rows))
    assert data.overlap.questions.rows == 0


def test_a_weight_repeats_pairs(
    rows: list[dict[str, str]], examined: Callable[..., PreparedData], tmp_path: Path
) -> None:
    source = {"path": str(tmp_path / "siblings.jsonl"), "weight": 2.5}
    data = examined(rows, data={"sources": [source]})
    expected = pairs_by_hand(rows)
    counts = Counter(pairs_of(data))
    assert counts.keys() == expected
    assert set(counts.values()) == {2, 3}
    assert data.train.stats.rows == round(2.5 * len(expected))
    assert data.train.stats.duplicates.rows == 0


def test_conversations_are_siblings_by_all_turns_but_the_last_answer(examined: Callable[..., PreparedData]) -> None:
    def row(system: str, *turns: str) -> dict:
        roles = ["user", "assistant"] * len(turns)
        messages = [{"role": "system", "content": system}] if system else []
        return {
            "messages": messages + [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        }

    rows = [
        row("river", "stone", "cloud", "amber", "seven"),
        row("", "stone", "cloud", "amber", "quiet"),
        row("north", "stone", "CLOUD", "amber", "paper"),  # another history
        row("maple", "stone", "cloud"),
    ]
    data = examined(rows)
    assert sorted(pairs_of(data)) == [(1, 2), (2, 1)]
    assert {reason: bad.count for reason, bad in data.left_out[0].reasons.items()} == {ALONE: 2}
    for ids, labels in data.train.dataset.pair(0):
        assert (labels[: np.flatnonzero(labels >= 0)[0]] == -100).all()
        assert len(ids) == len(labels)


def test_templates_that_prompt_for_thoughts_pair_only_answers_of_one_kind(
    examined: Callable[..., PreparedData], tmp_path: Path
) -> None:
    template = tmp_path / "thoughts.jinja"
    template.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% else %}<no>{% endif %}{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<no>{% else %}<think>{% endif %}{% endif %}"
    )

    def row(system: str, answer: dict[str, str]) -> dict:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": "stone"}]
        return {"messages": [*messages, {"role": "assistant", **answer}]}

    thoughts = {"reasoning_content": "cloud amber"}
    rows = [row("river", {"content": "a"}), row("north", {"content": "c", **thoughts})]
    rows += [row("maple", {"content": "b"}), row("seven", {"content": "d", **thoughts})]
    data = examined(rows, chat={"template": str(template)})
    assert sorted(pairs_of(data)) == [(1, 3), (2, 4), (3, 1), (4, 2)]


def test_an_instruction_of_too_many_rows_is_an_error(examined: Callable[..., PreparedData]) -> None:
    rows = [{"system": f"river {number}", "prompt": "stone", "output": f"cloud {number}"} for number in range(101)]
    with pytest.raises(
        UserError, match=r"data.sources.0: 101 rows have the same instruction, .*siblings.jsonl:1: .*100"
    ):
        examined(rows)
    assert examined(rows, "one").train.stats.rows == 101
    data = {"sources": [{"path": str(Path(examined(rows, "one").caches[0].source)), "siblings": 3}]}
    assert examined(rows, data=data).train.stats.rows == 6


def test_a_source_without_pairs_is_an_error(rows: list[dict[str, str]], examined: Callable[..., PreparedData]) -> None:
    with pytest.raises(UserError, match=r"data.sources.0: .*siblings.jsonl has no pair: .* of its 3 rows"):
        examined([{**row, "prompt": str(number)} for number, row in enumerate(rows[:3])])


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_keeps_so_many_rows_of_each_instruction(
    limit: int, rows: list[dict[str, str]], recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "siblings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def kept(siblings: int | None, seed: int = 42) -> tuple[set[int], PreparedData]:
        recipe = load_recipe(recipe_file(data={"sources": [{"path": str(path), "siblings": siblings}]}, seed=seed))
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        data = examine(recipe, tokenizer)
        places = [place for at in range(len(data.train.dataset)) for place in data.train.dataset.places(at)]
        assert len(set(places)) == len(places)
        return {int(place.rpartition(":")[2]) - 1 for place in places}, data

    of_instruction = Counter(row["prompt"] for row in rows)
    lines, data = kept(limit)
    assert Counter(rows[line]["prompt"] for line in lines) == {
        prompt: min(count, limit) for prompt, count in of_instruction.items()
    }
    assert lines <= kept(limit + 1)[0]
    assert kept(None)[0] == set(range(len(rows)))
    if limit == 1:
        assert kept(limit, seed=7)[0] != lines
    groups = [
        group for group in find_dropped_rows(data, load_recipe(recipe_file()).data) if group.outcome == "left out"
    ]
    words = "1 row" if limit == 1 else f"{limit} rows"
    assert [(group.rows, group.reason) for group in groups] == [
        (len(rows) - len(lines), f"more than {words} of an instruction (data.sources.0.siblings)")
    ]
