"""scripts/benchmark.py preference: TRL and ours train the same pairs with the same losses, counted again by hand."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAIRS, BATCH, MAX_LENGTH, EPOCHS = 4, 2, 900, 3
SETTINGS = {
    "pairs": PAIRS,
    "pairs_per_step": PAIRS,
    "batch": BATCH,
    "max_length": MAX_LENGTH,
    "config": "tiny",
    "seed": 3,
    "epochs": EPOCHS,
    "learning_rate": 0.01,
}
NAMES = ["ours", "trl", "trl-beside", "trl-single"]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="compares sums of a CPU")


@pytest.fixture(scope="module")
def scripts() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        from benchmarks import preference, preference_contenders
    return SimpleNamespace(preference=preference, contenders=preference_contenders)


@pytest.fixture(scope="module")
def workload(tmp_path_factory: pytest.TempPathFactory, scripts: SimpleNamespace) -> dict[str, Any]:
    """Return the settings of a workload in which each step of ours trains all pairs."""
    folder = tmp_path_factory.mktemp("preference")
    return {**SETTINGS, **scripts.preference.write_workload(folder, SETTINGS), "sequences_per_step": 100}


@pytest.fixture(scope="module")
def results(workload: dict[str, Any], scripts: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Train with each contender in this process, and return their results."""
    results = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        training = scripts.contenders.Training()
        task = {**workload, "contender": name, "folder": str(folder)}
        scripts.contenders.RUNS[name](task, training).train()
        results[name] = scripts.contenders.summarize(training)
    return results


def rows_by_hand(workload: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """Return the tokens of the prompt of each pair, and those of both halves: one per letter and the template's."""
    pairs = []
    for line in Path(workload["rows_file"]).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        system, user, chosen, rejected = (
            message["content"] for column in ("prompt", "chosen", "rejected") for message in row[column]
        )
        prompt = 1 + len(f"[INST] {system}\n{user} [/INST]")
        pairs.append((prompt, [min(prompt + len(f" {text}") + 1, MAX_LENGTH) for text in (chosen, rejected)]))
    return pairs


def test_all_contenders_train_the_same_ids_and_labels(results: dict[str, Any], workload: dict[str, Any]) -> None:
    pairs = rows_by_hand(workload)
    assert any(MAX_LENGTH in halves for _, halves in pairs)  # cut
    tokens = sum(sum(halves) for _, halves in pairs)
    trained = sum(half - prompt for prompt, halves in pairs for half in halves)
    for name in NAMES:
        result = results[name]
        assert result["digests"] == results["ours"]["digests"]
        assert len(set(result["digests"])) == PAIRS
        assert result["pairs"] == [PAIRS] * EPOCHS
        assert result["tokens"] == [tokens] * EPOCHS
        assert result["trained_tokens"] == [trained] * EPOCHS


def test_all_contenders_have_the_same_losses(results: dict[str, Any]) -> None:
    expected = results["trl"]["losses"]
    assert expected[0] == pytest.approx(math.log(2), abs=1e-4)  # the model is the reference
    assert (
        abs(expected[-1] - math.log(2)) > 0.01
    )  # it has moved in the second, as the warm-up begins with a learning rate of 0
    for name in NAMES:
        assert results[name]["losses"] == pytest.approx(expected, abs=1e-4), name


def test_padding_is_computed_by_trl_alone(results: dict[str, Any], workload: dict[str, Any]) -> None:
    pairs = [halves for _, halves in rows_by_hand(workload)]
    tokens = sum(map(sum, pairs))
    assert results["ours"]["computed_tokens"] == [tokens] * EPOCHS
    assert results["trl-single"]["computed_tokens"] == [sum(2 * max(halves) for halves in pairs)] * EPOCHS
    longest = sorted(max(halves) for halves in pairs)
    batches = {2 * BATCH * (longest[-1] + other) for other in longest[BATCH - 1 :]}  # two, each as long as its longest
    for name in ("trl", "trl-beside"):
        assert set(results[name]["computed_tokens"]) <= batches
        assert min(results[name]["computed_tokens"]) > tokens


def test_the_reference_is_timed_where_it_is_computed_before(results: dict[str, Any]) -> None:
    assert {name for name in NAMES if results[name]["reference_seconds"] > 0} == {"ours", "trl", "trl-single"}


def test_the_record_has_medians_of_the_steps(benchmark: Callable[..., CompletedProcess[str]], tmp_path: Path) -> None:
    file = tmp_path / "preference.json"
    arguments = ["--pairs", 6, "--pairs-per-step", 2, "--batch", 2, "--max-length", 800, "--seed", 4]
    result = benchmark("preference", *arguments, "--repeat", 1, "--only", "trl,ours", "--json", file)
    assert result.returncode == 0, result.stderr
    record = json.loads(file.read_text(encoding="utf-8"))
    assert [line["contender"] for line in record["medians"]] == ["ours", "trl"]
    speeds = {}
    for line, run in zip(record["medians"], record["measurements"], strict=True):
        assert line["step_seconds"] == statistics.median(run["seconds"][1:])
        rates = [tokens / seconds for tokens, seconds in zip(run["tokens"], run["seconds"], strict=True)][1:]
        whole = line["tokens"] / statistics.median(rates) + line["reference_seconds"]
        speeds[line["contender"]] = {"tokens_per_second": statistics.median(rates)}
        speeds[line["contender"]] |= {"with_reference": pytest.approx(line["tokens"] / whole)}
        assert {key: line[key] for key in speeds[line["contender"]]} == speeds[line["contender"]]
        assert sum(run["pairs"]) == line["pairs"] == 6
        assert line["steps"] == 3
    ours, trl = record["medians"]
    ratio = ours["tokens_per_second"] / trl["tokens_per_second"]
    assert record["ratios"]["trl"]["tokens_per_second"] == pytest.approx(ratio)
    assert f"janus-sft: {ratio:.2f} times as fast as TRL" in result.stdout
    assert f"the same ids and labels in all 6 pairs: {ours['tokens']:,} tokens" in result.stdout
    assert record["versions"]["trl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "ours,peft"], "--only: there is no 'peft'. Choose from ours, trl, trl-beside, trl-single."),
        (["--batch", 3], "--batch: 8 pairs of a step are no multiple of 3."),
        (["--pairs", 15], "--pairs: the first step is not timed, so write 16 or more."),
    ],
)
def test_options_that_measure_nothing_are_refused(
    arguments: list[Any], message: str, refused: Callable[..., str]
) -> None:
    assert message in " ".join(refused("preference", *arguments).split())
