"""bench --pick-by reward: a reward model scores each answer as plain transformers does, and the highest one counts."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import bench_row, command, judging, lines, write_lines
from peft import LoraConfig, PeftModel, get_peft_model
from scripted_server import served
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl.trainer.reward_trainer import suppress_seqcls_warning

ROWS = [bench_row(number, rubric_count=1, system=f"Zebra {number}.", prompt="Question?") for number in range(3)]
ANSWERS = 4


@pytest.fixture(scope="module")
def reward_models(tiny_chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a reward model with random weights, and an adapter of one whose base is a language model."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    folders = {kind: folder / kind for kind in ("full", "adapter")}
    for kind, path in folders.items():
        with suppress_seqcls_warning():
            model = AutoModelForSequenceClassification.from_pretrained(tiny_chat_model, num_labels=1)
        torch.manual_seed(4)
        model.score.weight.data.normal_()
        if kind == "full":
            model.config.pad_token_id = tokenizer.pad_token_id
        else:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS"))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return folders


def score(kind: str, folder: Path, base: Path, messages: list[dict[str, str]]) -> float:
    """Return the reward of a conversation alone, by plain transformers and peft."""
    with suppress_seqcls_warning():
        model = AutoModelForSequenceClassification.from_pretrained(folder if kind == "full" else base, num_labels=1)
    if kind == "adapter":
        model = PeftModel.from_pretrained(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        return model.eval()(**ids).logits.item()


def rewards_in(folder: Path) -> dict[bytes, tuple[str, float]]:
    """Return the journal's rewards and when each was asked for, by key."""
    with sqlite3.connect(folder / "bench.sqlite") as journal:
        rows = journal.execute("SELECT key, text, asked_at FROM answers WHERE stage = 'reward'").fetchall()
    return {key: (text, asked_at) for key, text, asked_at in rows}


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_answer_with_the_highest_reward_counts_and_is_judged_alone(
    kind: str, reward_models: dict[str, Path], tiny_chat_model: Path, tmp_path: Path
) -> None:
    data, output = write_lines(tmp_path / "rows.jsonl", ROWS), tmp_path / "out"
    asking: list[Any] = [
        "--model", tiny_chat_model, "--data", data, "--judge", "judge", "--runs", 2, "--output-dir", output,
        "--max-tokens", 6, "--repetition-penalty", 1, "--batch-size", 5,
        "--best-of", ANSWERS, "--pick-by", "reward", "--reward-model", reward_models[kind],
    ]  # fmt: skip
    with served(judging(lambda row, rubric, time: "[RESULT] 3"), models=["judge"]) as server:
        asking += ["--judge-server", server.url]
        assert command(*map(str, asking)) == 0
        asked = len(server.asked)
        first, journaled = lines(output / "bench_rows.jsonl"), rewards_in(output)

        # Lose two rewards, as a run that was killed: the same command computes these two alone.
        lost = sorted(journaled)[:2]
        with sqlite3.connect(output / "bench.sqlite") as journal:
            journal.executemany("DELETE FROM answers WHERE key = ?", [(key,) for key in lost])
        assert command(*map(str, asking)) == 0
        assert len(server.asked) == asked
    again = rewards_in(output)
    assert again.keys() == journaled.keys()
    assert {key for key in again if again[key][1] != journaled[key][1]} == set(lost)
    assert [row["picked"] for row in lines(output / "bench_rows.jsonl")] == [row["picked"] for row in first]

    for row, line in zip(ROWS, first, strict=True):
        prompt = [{"role": "system", "content": row["system"]}, {"role": "user", "content": row["prompt"]}]
        expected = [
            score(kind, reward_models[kind], tiny_chat_model, [*prompt, {"role": "assistant", "content": text}])
            for text in (answer["response"] for answer in line["answers"])
        ]
        assert [answer["scorer"] for answer in line["answers"]] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert line["picked"] == max(range(ANSWERS), key=lambda number: (expected[number], -number))
        judged = [number for number, answer in enumerate(line["answers"]) if answer["judgements"][0][0]]
        assert judged == [line["picked"]]
    best = json.loads((output / "bench.json").read_text("utf-8"))["best_of"]
    assert best["picked_by"] == f"reward model {reward_models[kind]}"
    assert f"picked by the reward model {reward_models[kind]}" in (output / "report.md").read_text("utf-8")


def test_other_models_and_missing_options_are_refused_before_a_model_answers(
    reward_models: dict[str, Path], tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_lines(tmp_path / "rows.jsonl", ROWS)
    for options, error in (
        (["--pick-by", "reward"], "belong together"),
        (["--reward-model", reward_models["full"]], "belong together"),
        (["--pick-by", "reward", "--reward-model", tiny_chat_model], "it is no reward model"),
        (["--pick-by", "reward", "--reward-model", tmp_path], "there is no config.json"),
    ):
        asking = ["--model", tiny_chat_model, "--data", data, "--judge", "judge", "--judge-server",
                  "http://127.0.0.1:9/v1", "--output-dir", tmp_path / "out", "--best-of", 2, *options]  # fmt: skip
        assert command(*map(str, asking)) == 2
        assert error in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_reward_model_is_no_model_that_answers(kind: str, reward_models: dict[str, Path]) -> None:
    from train.errors import UserError
    from train.model.load import load_saved

    with pytest.raises(UserError, match="it is a reward model, which writes no answers"):
        load_saved(str(reward_models[kind]))
