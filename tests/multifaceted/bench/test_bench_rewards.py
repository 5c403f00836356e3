"""bench --pick-by reward: a reward model scores each answer as plain transformers does, and the highest one counts."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import FIRST_CONTACT, bench_row, command, judging, lines, place_of, write_lines
from killed_batches import killed_at_a_call, run_until_killed, stored_answers
from peft import PeftModel
from scripted_server import served
from small_runs import write_recipe
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_trainer import suppress_seqcls_warning

from train import preference
from train.errors import UserError
from train.evaluation.models.rewards import open_reward_model
from train.model.load import load_saved

ROWS = [bench_row(number, rubric_count=1, system=f"Zebra {number}.", prompt="Question?") for number in range(3)]
ANSWERS, BATCH, RUNS = 4, 5, 2
KILLED_AFTER_REWARDS = killed_at_a_call("train.evaluation.models.rewards", "RewardModel", "score")


@pytest.fixture(scope="module")
def reward_models(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Train a reward model, and an adapter of one whose base is a language model, on a few pairs."""
    folder = tmp_path_factory.mktemp("reward")
    pairs = [
        {"system": f"Zebra {n}.", "prompt": "Question?", "chosen": f"River {n}", "rejected": f"Stone {n}"}
        for n in range(8)
    ]
    rows = write_lines(folder / "pairs.jsonl", pairs)
    for kind, adapter in ("full", None), ("adapter", {"r": 2}):
        recipe = write_recipe(
            folder / f"{kind}.yaml",
            tiny_chat_model,
            rows,
            folder / kind,
            data={"cache_dir": str(folder / "cache")},
            training={"max_steps": 3, "save_strategy": "no"},
            preference={"loss": "reward"},
            adapter=adapter,
        )
        assert preference.main(["--recipe", str(recipe)]) == 0
    return {kind: folder / kind for kind in ("full", "adapter")}


def load(kind: str, folder: Path, base: Path) -> Any:
    """Return a reward model as plain transformers and peft load it."""
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(folder if kind == "full" else base, num_labels=1)
    return (PeftModel.from_pretrained(model, folder) if kind == "adapter" else model).eval()


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_answer_with_the_highest_reward_counts_and_is_judged_alone(
    kind: str, reward_models: dict[str, Path], tiny_chat_model: Path, tmp_path: Path
) -> None:
    """Also if the run is killed after the first rewards: the next one takes them from the journal."""
    folder, output = reward_models[kind], tmp_path / "out"
    asking: list[Any] = [
        "--model", tiny_chat_model, "--data", write_lines(tmp_path / "rows.jsonl", ROWS), "--output-dir", output,
        "--max-tokens", 6, "--repetition-penalty", 1, "--batch-size", BATCH, "--judge", "judge", "--runs", RUNS,
        "--best-of", ANSWERS, "--pick-by", "reward", "--reward-model", folder,
    ]  # fmt: skip
    with served(judging(lambda row, rubric, time: "[RESULT] 3"), models=["judge"]) as server:
        asking += ["--judge-server", server.url]
        run_until_killed(["bench", *asking], tmp_path, KILLED_AFTER_REWARDS, batches=1)
        before = stored_answers(output / "bench.sqlite")
        assert len(before) == len(ROWS) * ANSWERS + BATCH
        assert command(*map(str, asking)) == 0
    assert before < stored_answers(output / "bench.sqlite")  # with the times at which they were computed

    rows = lines(output / "bench_rows.jsonl")
    model, tokenizer = load(kind, folder, tiny_chat_model), AutoTokenizer.from_pretrained(folder)
    for row, line in zip(ROWS, rows, strict=True):
        prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
        expected = []
        for answer in line["answers"]:
            messages = [*prompt, {"role": "assistant", "content": answer["response"]}]
            with torch.no_grad():
                ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
                expected.append(model(**ids).logits.item())
        assert [answer["scorer"] for answer in line["answers"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert line["picked"] == expected.index(max(expected))
    questions = [asked.prompt for asked in server.asked if asked.prompt != FIRST_CONTACT]
    assert sorted(place_of(question)[0] for question in questions) == sorted([*range(len(ROWS))] * RUNS)
    for question in questions:
        line = rows[place_of(question)[0]]
        assert line["answers"][line["picked"]]["response"] in question
    best = json.loads((output / "bench.json").read_text("utf-8"))["best_of"]
    assert best["picked_by"] == f"reward model {folder}"
    assert f"picked by the reward model {folder}" in (output / "report.md").read_text("utf-8")


def test_an_adapter_is_scored_with_the_padding_token_of_its_training(
    reward_models: dict[str, Path], tiny_chat_model: Path, tmp_path: Path
) -> None:
    """The saved tokenizer has that token; the base may have another one, and rewards are read before padding."""
    base, adapter, padding_of_base = tmp_path / "base", tmp_path / "adapter", 5
    for source, folder, file, change in (
        (tiny_chat_model, base, "config.json", {"pad_token_id": padding_of_base}),
        (reward_models["adapter"], adapter, "adapter_config.json", {"base_model_name_or_path": str(base)}),
    ):
        shutil.copytree(source, folder)
        settings = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps(settings | change), encoding="utf-8")
    texts = [[9, 8, padding_of_base], [7, 6, 9, 8]]
    model = load("adapter", adapter, base)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(adapter).pad_token_id
    expected = [model(torch.tensor([text])).logits.item() for text in texts]
    assert open_reward_model(str(adapter)).score(texts) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_other_models_and_missing_options_are_refused_before_a_model_answers(
    reward_models: dict[str, Path], tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, labels = write_lines(tmp_path / "rows.jsonl", ROWS), tmp_path / "labels"
    with suppress_seqcls_warning():
        AutoModelForSequenceClassification.from_pretrained(tiny_chat_model, num_labels=3).save_pretrained(labels)
    for options, error in (
        (["--pick-by", "reward"], "belong together"),
        (["--reward-model", reward_models["full"]], "belong together"),
        (["--pick-by", "reward", "--reward-model", tiny_chat_model], "it is no reward model"),
        (["--pick-by", "reward", "--reward-model", labels], "it is no reward model"),
        (["--pick-by", "reward", "--reward-model", tmp_path], "there is no config.json"),
    ):
        asking = ["--model", tiny_chat_model, "--data", data, "--judge", "judge", "--judge-server",
                  "http://127.0.0.1:9/v1", "--output-dir", tmp_path / "out", "--best-of", 2, *options]  # fmt: skip
        assert command(*map(str, asking)) == 2
        assert error in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_reward_model_is_no_model_that_answers(kind: str, reward_models: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="it is a reward model or another classifier, which writes no answers"):
        load_saved(str(reward_models[kind]))
