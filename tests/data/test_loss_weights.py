"""Loss weights of messages, rows and sources: how they are read, kept on disk and shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from train.data import cache
from train.data.chat.template import use_template
from train.data.loss_mask import EncodedRow, Encoder
from train.data.prepare import examine, prepare
from train.data.prepared_data import PreparedData
from train.data.sources.formats import RowError, convert, read_row
from train.data.sources.loss_weights import weight_of
from train.data.tokens.table import SCHEMA, TokensDigest, TokenTable, make_batch, write_table
from train.errors import UserError
from train.model.tokenizer import load_chat_tokenizer, load_tokenizer
from train.preflight.page import page
from train.preflight.report import build_report
from train.recipe import load_recipe

USER, ASSISTANT = {"role": "user", "content": "Ask."}, {"role": "assistant", "content": "Say."}


def weights_of(row: dict[str, Any], format: str = "messages") -> list[float]:
    messages, _ = convert(row, format)
    return [weight_of(message) for message in messages if message["role"] == "assistant"]


# -- reading


@pytest.mark.parametrize("key", ["weight", "loss_weight", "loss_scale"])
def test_a_message_has_a_weight_under_each_of_its_names(key: str) -> None:
    answers = [{**ASSISTANT, key: weight} for weight in (0, 0.5, 1, 2, 1_000_000, True, None)]
    row = {"messages": [turn for answer in answers for turn in (USER, answer)]}
    assert weights_of(row) == [0, 0.5, 1, 2, 1_000_000, 1, 1]
    assert "loss_weight" not in convert(row, "messages")[0][5]  # a weight of 1 leaves no trace


def test_weights_and_switches_may_stand_together() -> None:
    assert weights_of({"messages": [USER, {**ASSISTANT, "weight": 0.5, "loss_scale": 0.5, "train": True}]}) == [0.5]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": [USER, ASSISTANT]}),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Ask."}, {"from": "gpt", "value": "Say."}]}),
        ("janus", {"prompt": "Ask.", "output": "Say."}),
        ("alpaca", {"instruction": "Ask.", "output": "Say."}),
        ("prompt_completion", {"prompt": "Ask.", "completion": "Say."}),
        ("question_answer", {"question": "Ask.", "answer": "Say."}),
        ("exchanges", {"conversation": [{"input": "Ask.", "output": "Say."}]}),
    ],
)
def test_a_row_has_a_weight_in_every_format(format: str, row: dict[str, Any]) -> None:
    unread: dict[str, list[Any]] = {}
    messages, _ = convert({**row, "loss_weight": 0.25}, format, unread=unread)
    assert [weight_of(message) for message in messages if message["role"] == "assistant"] == [0.25]
    assert not unread
    ignored = read_row({**row, "loss_weight": 0.25}, format, ":1", ignore=["loss_weight"])
    assert weight_of(ignored.messages[-1]) == 1


def test_the_weights_of_a_row_and_its_messages_are_multiplied() -> None:
    turns = [USER, {**ASSISTANT, "weight": 0}, USER, {**ASSISTANT, "weight": 0.5}, USER, ASSISTANT]
    assert weights_of({"messages": turns, "loss_weight": 4}) == [0, 2, 4]
    assert weights_of({"messages": turns, "loss_weight": 2}) == [0, 1, 2]


WRONG = {
    "a negative weight": ({"weight": -0.5}, {}, "wrong type", "`weight` of message 2 is the number -0.5"),
    "NaN": ({"loss_weight": float("nan")}, {}, "wrong type", "it must be 0, or a number from 0.000001 to 1,000,000"),
    "infinity": ({"loss_scale": float("inf")}, {}, "wrong type", "`loss_scale`"),
    "a text": ({"weight": "0.5"}, {}, "wrong type", 'the text "0.5"'),
    "a half switch": ({"train": 0.5}, {}, "wrong type", "it must be true or false"),
    "two weights": ({"weight": 0.5, "loss_scale": 2}, {}, "conflicting values", "`weight` and `loss_scale`"),
    "a weight that is off": ({"weight": 0.5, "masked": True}, {}, "conflicting values", "`weight` and `masked`"),
    "a negative row": ({}, {"loss_weight": -1}, "wrong type", "the row's `loss_weight` is the number -1"),
    "a row of text": ({}, {"loss_weight": "high"}, "wrong type", "the row's `loss_weight`"),
    "a row of NaN": ({}, {"loss_weight": float("nan")}, "wrong type", "0, or a number"),
    "next to nothing": ({"weight": 1e-9}, {}, "wrong type", "1e-09"),
    "a row of 0": ({}, {"loss_weight": 0}, "no assistant turn", "Leave the row out"),
    "answers of 0": ({"weight": 0.0}, {"loss_weight": 2}, "no assistant turn", "each has a loss switch"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_weights_are_row_errors(name: str) -> None:
    turn, row, kind, detail = WRONG[name]
    with pytest.raises(RowError) as error:
        convert({"messages": [USER, {**ASSISTANT, **turn}], **row}, "messages")
    assert error.value.kind == kind
    assert detail in error.value.detail


def test_a_user_has_no_weight() -> None:
    with pytest.raises(RowError, match="only the assistant's messages are trained"):
        convert({"messages": [{**USER, "weight": 0.5}, ASSISTANT]}, "messages")


# -- tokens


def conversation(*weights: float, row_weight: float | None = None) -> dict[str, Any]:
    """Return a row with an answer for each weight, each of other words."""
    answers = [{"role": "assistant", "content": f"say {'cloud ' * number}."} for number in range(1, len(weights) + 1)]
    turns = [
        turn
        for answer, weight in zip(answers, weights, strict=True)
        for turn in (USER, answer if weight == 1 else {**answer, "weight": weight})
    ]
    return {"messages": turns, **({} if row_weight is None else {"loss_weight": row_weight})}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(tokenizer: Any, row: dict[str, Any], *, fast: bool) -> list[EncodedRow] | RowError:
    read = read_row(row, "messages", ":1")
    (encoded,) = Encoder(tokenizer, fast=fast).encode([(read.messages, read.tools)], "assistant")
    return encoded


@pytest.mark.parametrize("fast", [True, False])
def test_spans_have_the_weights_of_their_messages(chatml_tokenizer: Any, fast: bool) -> None:
    (row,) = encode(chatml_tokenizer, conversation(0.5, 0, 1, 3, row_weight=2), fast=fast)
    texts = [chatml_tokenizer.decode(row.ids[start:end]) for start, end in row.trained.tolist()]
    assert texts == [f"say {'cloud ' * number}.<|im_end|>" for number in (1, 3, 4)]
    assert row.span_weights.tolist() == [1, 2, 6]
    (plain,) = encode(chatml_tokenizer, conversation(1, 0, 1, 1), fast=fast)
    assert plain.weights is None
    assert np.array_equal(plain.trained, row.trained)
    assert plain != row


MERGING = (
    "{% for message in messages %}{% if message.role == 'user' %}<|im_start|>user\n{{ message.content }}<|im_end|>\n"
    "{% else %}{% if loop.previtem.role != 'assistant' %}<|im_start|>assistant\n{% endif %}{{ message.content }}"
    "{% if loop.last or loop.nextitem.role != 'assistant' %}<|im_end|>\n{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_merged_answers_must_have_one_weight(tokenizer: Any) -> None:
    tokenizer.chat_template = MERGING
    half, whole = {**ASSISTANT, "weight": 0.5}, {"role": "assistant", "content": "So."}
    (row,) = encode(tokenizer, {"messages": [USER, half, half | whole]}, fast=False)
    assert row.span_weights.tolist() == [0.5]
    error = encode(tokenizer, {"messages": [USER, half, whole]}, fast=False)
    assert isinstance(error, RowError)
    assert (error.kind, error.detail) == ("answers merged by the template", "message 3 with one of another loss weight")


def encoded_rows(tokenizer: Any, rows: list[dict[str, Any]]) -> list[tuple[Any, list[EncodedRow]]]:
    return [
        (read_row(row, "messages", f":{number}"), encode(tokenizer, row, fast=False)) for number, row in enumerate(rows)
    ]


def test_a_table_keeps_weights_beside_its_rows(chatml_tokenizer: Any, tmp_path: Path) -> None:
    rows = [conversation(1), conversation(1, 1), conversation(0.5, 3), conversation(1), conversation(1, row_weight=0.1)]
    encoded = encoded_rows(chatml_tokenizer, rows)
    plain = encoded_rows(chatml_tokenizer, [conversation(*[1] * (len(row["messages"]) // 2)) for row in rows])
    batches = [make_batch(0, encoded[start:end]) for start, end in ((0, 2), (2, 3), (3, 5))]
    write_table(tmp_path / "weighted.arrow", batches)
    write_table(tmp_path / "plain.arrow", [make_batch(0, plain[start:end]) for start, end in ((0, 2), (2, 3), (3, 5))])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plain.arrow",
        "weighted.arrow",
        "weighted.loss_weights",
    ]
    with pyarrow.OSFile(str(tmp_path / "bare.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, SCHEMA) as stream:
        for start, end in ((0, 2), (2, 3), (3, 5)):
            stream.write_batch(make_batch(0, plain[start:end]))
    assert (tmp_path / "plain.arrow").read_bytes() == (tmp_path / "bare.arrow").read_bytes()

    files = [tmp_path / "weighted.arrow", tmp_path / "plain.arrow", tmp_path / "weighted.arrow"]
    table = TokenTable(files, [[""]] * 3, [1, 2, 0.5])
    expected = [[1], [1, 1], [0.5, 3], [1], [np.float32(0.1)]]
    expected += [[2], [2, 2], [2, 2], [2], [2]] + [[np.float32(0.5) * weight for weight in row] for row in expected]
    assert [table.loss_weights(row).tolist() for row in range(15)] == expected
    assert table.has_loss_weight.tolist() == [any(weight != 1 for weight in row) for row in expected]
    assert not TokenTable(files[1:2], [[""]]).has_loss_weight.any()

    digests = []
    for parts in (batches, [make_batch(0, encoded)], [make_batch(0, [row]) for row in encoded], [make_batch(0, plain)]):
        digest = TokensDigest()
        for batch in parts:
            digest.add(batch)
        digests.append(digest.facts()["digest"])
    assert digests[0] == digests[1] == digests[2] != digests[3]


# -- sources, cache and report


@pytest.fixture
def examined(recipe_file: Callable[..., Path], tmp_path: Path) -> Callable[..., PreparedData]:
    def run(**data: Any) -> PreparedData:
        recipe = load_recipe(recipe_file(data={"cache_dir": str(tmp_path / "cache"), "max_length": 256, **data}))
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        return prepare(recipe, tokenizer)

    return run


def weight_sums(data: PreparedData) -> dict[str, float]:
    """Return place -> sum of the loss weights of a row's tokens."""
    dataset = data.train.dataset
    sums: dict[str, float] = {}
    for sequence, item in enumerate(dataset):
        starts = np.cumsum([0, *item["seq_lengths"][:-1]])
        parts = np.add.reduceat(item["loss_weights"], starts)
        sums |= dict(zip([place.rpartition("/")[2] for place in dataset.places(sequence)], parts.tolist(), strict=True))
    return sums


def test_another_loss_weight_of_a_source_tokenizes_nothing_again(
    examined: Callable[..., PreparedData], tmp_path: Path
) -> None:
    first, second = (write(tmp_path / f"{name}.jsonl", [conversation(1), conversation(0.5)]) for name in "ab")
    before = examined(sources=[{"path": str(first)}, {"path": str(second)}])
    after = examined(sources=[{"path": str(first)}, {"path": str(second), "loss_weight": 3.0}])
    assert [cached.hit for cached in after.caches] == [True, True]
    assert [cached.tokens for cached in after.caches] == [cached.tokens for cached in before.caches]
    plain, weighted = weight_sums(before), weight_sums(after)
    assert plain["a.jsonl:1"] == 2 * plain["a.jsonl:2"] > 0
    factors = {"a.jsonl:1": 1, "a.jsonl:2": 1, "b.jsonl:1": 3, "b.jsonl:2": 3}
    assert weighted == {place: plain[place] * factor for place, factor in factors.items()}
    assert (before.train.stats.rows_with_loss_weight, after.train.stats.rows_with_loss_weight) == (2, 3)
    assert before.train.dataset.digest() == after.train.dataset.digest()


def test_truncated_rows_keep_the_weights_of_what_is_left(examined: Callable[..., PreparedData], tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [conversation(0.5, 2, 3)])
    whole = examined(sources=[{"path": str(path)}], max_length=512).train.dataset[0]
    cut = examined(sources=[{"path": str(path)}], max_length=40, overlong="truncate").train.dataset[0]
    assert len(whole["loss_weights"]) > 40 == len(cut["loss_weights"])
    assert np.array_equal(cut["loss_weights"], whole["loss_weights"][:40])
    assert np.array_equal(cut["loss_weights"] > 0, cut["labels"] != -100)


def test_a_cache_entry_of_an_earlier_version_is_made_again_if_weights_were_not_read(
    examined: Callable[..., PreparedData], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions had no fact `loss_weights`, and `loss_weight` was a column that nothing reads."""
    weighted = write(tmp_path / "weighted.jsonl", [conversation(1, row_weight=0.5), conversation(1)])
    plain = write(tmp_path / "plain.jsonl", [conversation(1)])
    sources = [{"path": str(weighted)}, {"path": str(plain)}]
    folders = [Path(cached.folder) for cached in examined(sources=sources).caches]
    for folder in folders:
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["facts"]["loss_weights"]
        manifest["facts"]["unread"] = {"loss_weight": [1, 0, None]} if folder == folders[0] else {}
        manifest["files"].pop("rows.loss_weights", None)
        manifest["digest"] = cache._digest(manifest["facts"])
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "rows.loss_weights").unlink(missing_ok=True)
    data = examined(sources=sources)
    assert [cached.hit for cached in data.caches] == [False, True]
    assert data.train.stats.rows_with_loss_weight == 1
    assert [cached.hit for cached in examined(sources=sources).caches] == [True, True]


def test_check_shows_the_weights(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    rows = [conversation(0.5, 2, row_weight=3), conversation(1)]
    paths = [write(tmp_path / f"{name}.jsonl", part) for name, part in (("a", rows), ("b", rows[1:]))]
    sources = [{"path": str(paths[0])}, {"path": str(paths[1]), "loss_weight": 0.1}]
    path = recipe_file(data={"sources": sources, "validation": [{"path": str(paths[1])}]})
    recipe = load_recipe(path)
    chat = load_chat_tokenizer(recipe.model, recipe.chat)
    report = build_report(recipe, chat, examine(recipe, chat.tokenizer))
    lines = page(report, [], coloured=False, width=1_000).plain.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("loss weight"))
    assert [line[12:] for line in lines[start : start + 2]] == [
        "2 of 3 training rows have a loss weight other than 1",
        f"data.sources.1.loss_weight: 0.1 ({paths[1]})",
    ]
    headers = {line.split(": ")[0]: line for line in lines if line.startswith("--- ")}
    assert headers[f"--- {paths[0]}:1"].endswith(", loss weight 1.5, 6")
    assert "loss weight" not in headers[f"--- {paths[0]}:2"]
    assert "validation rows have" not in "\n".join(lines)
    assert report.training.rows_with_loss_weight == 2


@pytest.mark.parametrize("weight", [0, -1, 1e7, ".nan"])
def test_a_source_without_weight_is_refused(weight: Any, recipe_file: Callable[..., Path], rows_file: Path) -> None:
    path = recipe_file(data={"sources": [{"path": str(rows_file), "loss_weight": weight}]})
    with pytest.raises(UserError, match=r"data\.sources\.0\.loss_weight"):
        load_recipe(path)
