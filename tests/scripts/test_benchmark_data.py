"""scripts/benchmark.py data: its counts are counted again from the rows with the plain tokenizer."""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType

import pytest
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[2]
ROWS, MAX_LENGTH, SEED = 60, 6_000, 5


@pytest.fixture
def benchmark_rows(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from benchmarks import rows as benchmark_rows

    return benchmark_rows


def test_its_counts_are_those_of_the_rows(
    benchmark: Callable[..., CompletedProcess[str]], tiny_model: Path, tmp_path: Path, benchmark_rows: ModuleType
) -> None:
    file = tmp_path / "data.json"
    result = benchmark("data", "--tokenizer", tiny_model, "--rows", ROWS, "--repeat", 1, "--max-length", MAX_LENGTH,
                       "--seed", SEED, "--processes", 2, "--json", file)  # fmt: skip
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text(encoding="utf-8"))

    # A second way: each message by itself, ChatML written by hand, cut at max_length as both trainers do.
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    whole = kept = trained = shortened = untrained = 0
    for messages in benchmark_rows.generate(ROWS, SEED):
        row: list[bool] = []  # of each token whether it is trained
        for message in messages:
            header, content, end = (
                len(tokenizer(text, add_special_tokens=False).input_ids)
                for text in (f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>", "\n")
            )
            row += [False] * header + [message["role"] == "assistant"] * content + [False] * end
        cut = row[:MAX_LENGTH]
        whole, kept, trained = whole + len(row), kept + len(cut), trained + sum(cut)
        shortened += len(row) > MAX_LENGTH
        untrained += not any(cut)
    assert shortened  # otherwise no tokens would be lost whatever the code did
    assert not untrained  # such a row is dropped by ours and kept by TRL

    medians = {line["contender"]: line for line in record["medians"]}
    assert list(medians) == ["trl", "trl-N", "ours", "ours-again", "tokenizer", "fastokens"]
    for name in ("tokenizer", "fastokens"):
        assert (medians[name]["rows"], medians[name]["tokens"]) == (ROWS, whole)
    for name in ("trl", "trl-N", "ours", "ours-again"):
        line = medians[name]
        assert (line["rows"], line["tokens"], line["trained_tokens"]) == (ROWS, kept, trained)
        assert (line["rows_lost"], line["tokens_lost"]) == (0, whole - kept)
        assert line["sequences"] >= math.ceil(kept / MAX_LENGTH)
        assert line["filling"] == pytest.approx(kept / line["sequences"] / MAX_LENGTH)
    assert all(difference["same_rows"] == ROWS for difference in record["differences"])
    assert {(pair["first"], pair["second"]) for pair in record["differences"]} == {
        ("trl", "ours"), ("trl", "trl-N"), ("ours", "ours-again"), ("tokenizer", "fastokens"),
    }  # fmt: skip

    assert [run["contender"] for run in record["measurements"]] == list(medians)
    for figures in record["measurements"]:
        assert figures["peak_memory"] >= figures["memory_before"] > 0
        assert figures["peak_anonymous"] >= figures["anonymous_before"] > 0
        assert figures["peak_memory"] > figures["peak_anonymous"]
    assert medians["trl"]["disk"] > 8 * 2 * kept  # ids and labels, in one of its caches at 8 bytes each
    ratio = medians["trl-N"]["seconds"] / medians["ours"]["seconds"]
    assert record["ratios"]["ours / trl-N"] == pytest.approx(ratio)
    assert f"janus-sft: {ratio:.2f} times as fast as TRL's SFTTrainer (2 processes)" in result.stdout
    assert record["versions"]["trl"]
    assert record["machine"]["cores"] > 0
    assert result.stdout.count("\n| ") == 1 + len(medians)


def test_memory_is_compared_between_numbers_of_rows(
    benchmark: Callable[..., CompletedProcess[str]], tiny_model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "memory.json"
    options = ("--memory", 4, 40, "--repeat", 2, "--only", "tokenizer", "--json", file)
    result = benchmark("data", "--tokenizer", tiny_model, *options)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    order = [(run["repetition"], run["rows_in"]) for run in record["measurements"]]
    assert order == [(0, 4), (0, 40), (1, 4), (1, 40)]
    peaks = {
        rows: statistics.median(run["peak_memory"] for run in record["measurements"] if run["rows_in"] == rows)
        for rows in (4, 40)
    }
    assert record["growth"]["tokenizer"]["peak_memory"] == pytest.approx(peaks[40] / peaks[4] - 1)


def test_rows_are_those_of_the_seed_and_as_long_as_multifaceted_collection(benchmark_rows: ModuleType) -> None:
    rows = list(benchmark_rows.generate(400, 7))
    assert rows[:50] == list(benchmark_rows.generate(50, 7))
    assert rows[:50] != list(benchmark_rows.generate(50, 8))
    assert {tuple(message["role"] for message in row) for row in rows} == {("system", "user", "assistant")}
    system, user, assistant = ([len(row[turn]["content"]) for row in rows] for turn in range(3))
    assert 670 < min(system) < max(system) <= 1_370
    assert 15 < min(user) < max(user) <= 18_600
    # log-normal: the logarithms have the given spread, and the mean exceeds the median
    assert statistics.stdev(map(math.log, assistant)) == pytest.approx(0.5, rel=0.15)
    assert statistics.mean(assistant) > 1.05 * statistics.median(assistant)


def test_rows_are_of_real_length_in_tokens_and_full_of_new_words(benchmark_rows: ModuleType, chatml_tokenizer) -> None:
    rows = list(benchmark_rows.generate(400, 7))
    lengths = [len(chatml_tokenizer.apply_chat_template(row)["input_ids"]) for row in rows]
    assert 1_000 < statistics.mean(lengths) < 1_150
    text = "\n".join(message["content"] for row in rows for message in row)
    words = Counter(text.split())
    once = sum(1 for count in words.values() if count == 1)
    assert once > 0.3 * len(words)  # a tokenizer that caches words still sees many for the first time
    assert len(set(text)) > 150
    special = {str(token) for token in chatml_tokenizer.added_tokens_decoder.values() if token.special}
    assert not special & set(re.findall(r"<[^<>\s]*>", text))  # such rows are refused
    sentences = Counter(line for line in text.splitlines() if len(line) > 120)
    assert max(sentences.values()) == 1


def test_a_row_that_differs_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import numpy as np
    from benchmarks import data as benchmark_data
    from benchmarks import data_contenders as benchmark_contenders

    ids = np.array([5, 6, 7, 8, 9], np.int32)
    files = {}
    for name, trained in (("trl", [7, 8]), ("ours", [7, 8, 9])):
        tokens = benchmark_contenders.Tokens()
        labels = np.where(np.isin(ids, trained), ids, -100)
        tokens.add(ids, labels, [2, 3])
        files[name, 2] = tmp_path / f"{name}.npz"
        tokens.save(files[name, 2])
    settings = {"tokenizer": str(tiny_model)}
    (difference,) = benchmark_data.find_differences(files, settings)
    assert (difference["same_rows"], difference["only_first"], difference["only_second"]) == (1, 1, 1)
    assert (difference["tokens"], difference["trained_tokens"]) == (0, 1)
    nine = AutoTokenizer.from_pretrained(tiny_model).decode([9])
    assert difference["by_token"] == [{"token": nine, "occurrences": 0, "trained": 1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "trl,torchtune"], "error: --only: there is no 'torchtune'. Choose from trl, trl-N, ours"),
        (["--only", "ours-again"], "error: --only: ours-again reads the cache of ours"),
        (["--json", "no/such/folder/data.json"], "error: --json no/such/folder/data.json: there is no folder"),
        (["--template", "mistral-sytem"], "error: chat.template: there is no template 'mistral-sytem'"),
    ],
)
def test_invalid_options_are_errors(
    refused: Callable[..., str], tiny_model: Path, arguments: list[str], message: str
) -> None:
    assert refused("data", "--tokenizer", tiny_model, "--rows", 1, *arguments).startswith(message)


def test_a_contender_that_fails_is_an_error_with_its_reason(
    benchmark: Callable[..., CompletedProcess[str]], tmp_path: Path, tiny_model: Path
) -> None:
    for path in tiny_model.glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "tokenizer.json"
    broken = json.loads(file.read_text(encoding="utf-8"))
    del broken["model"]["vocab"]["k"]  # fastokens refuses a text with a byte that has no token
    file.write_text(json.dumps(broken), encoding="utf-8")
    result = benchmark("data", "--tokenizer", tmp_path, "--rows", 3, "--repeat", 1, "--only", "fastokens")
    assert result.returncode == 2
    assert result.stderr.startswith("error: fastokens could not be measured: ")
