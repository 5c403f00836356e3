"""System gain during training on two processes, replicated or partitioned: the metrics of one process."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import launch
from tiny_words import WORDS
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("deepspeed")


def measure_in_training(recipe: str, rows: str, report: str) -> None:
    """Train as train/sft.py does; when training begins, each rank measures and writes its results."""
    from transformers import TrainerCallback

    from train.data.chat.template import use_template
    from train.data.prepare import prepare
    from train.loop.arguments import training_arguments
    from train.loop.trainer import JanusTrainer
    from train.model.load import load_model
    from train.model.tokenizer import load_tokenizer
    from train.recipe import load_recipe
    from train.system_gain.log_likelihood import compute_log_likelihoods
    from train.system_gain.metric import system_gain
    from train.system_gain.variants import VariantRows

    loaded = load_recipe(recipe)
    tokenizer = load_tokenizer(loaded.model)
    use_template(tokenizer, loaded.chat.template)
    data = prepare(loaded, tokenizer)
    arguments = training_arguments(loaded)
    model = load_model(loaded)
    variant_rows = variants(rows, tokenizer)
    trainer = JanusTrainer(loaded, arguments, model, tokenizer, data, [], gain=VariantRows(variant_rows))
    forwards: list[int] = []

    class Measure(TrainerCallback):
        def on_train_begin(self, *_: object, **__: object) -> None:
            wrapped, accelerator = trainer.model_wrapped, trainer.accelerator
            hook = trainer.model.register_forward_hook(lambda *_: forwards.append(1))
            gain = system_gain(wrapped, variant_rows, accelerator, tokens_per_batch=700)
            hook.remove()
            # Fewer batches than processes: one has nothing of its own to score.
            alone = compute_log_likelihoods(wrapped, variant_rows[0].own, accelerator)
            Path(f"{report}-{arguments.process_index}.json").write_text(
                json.dumps(
                    {
                        "values": gain.values.tolist(),
                        "record": gain.record(),
                        "alone": alone.tolist(),
                        "forwards": len(forwards),
                        "evaluation": trainer.evaluate(),
                        "held": sum(value.numel() for value in trainer.model.parameters()),
                    }
                )
            )

    trainer.add_callback(Measure())
    trainer.train()


def variants(rows: str | Path, tokenizer: object) -> list:
    from train.data.tokens.workers import RowTokenizer
    from train.recipe import Source
    from train.system_gain.variants import make_variants, read_labelled_conversations

    return make_variants(
        read_labelled_conversations([Source(path=str(rows))]), RowTokenizer(tokenizer, "assistant")
    ).rows


@pytest.mark.parametrize("config", ["zero3.yaml", None], ids=["zero3", "ddp"])
def test_two_processes_give_the_metrics_of_one(
    config: str | None, recipe_file: Callable[..., Path], tiny_model: Path, tmp_path: Path
) -> None:
    from train.data.chat.template import use_template
    from train.data.prepare import prepare
    from train.recipe import load_recipe
    from train.system_gain.log_likelihood import make_batches
    from train.system_gain.metric import system_gain

    rng = random.Random(2)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    path = tmp_path / "answers.jsonl"
    with path.open("w") as lines:
        for row in range(11):
            turns = [
                ("system", f"{row} {text(6)}"),
                ("user", f"{row % 4}?"),
                ("assistant", text(rng.choice([1, 9, 40]))),
            ]
            lines.write(json.dumps({"messages": [{"role": role, "content": of} for role, of in turns]}) + "\n")
    recipe = recipe_file(
        data={"validation": 0.25, "packing": False},
        training={"per_device_train_batch_size": 1, "num_train_epochs": ..., "max_steps": 1, "bf16": False},
    )
    report = tmp_path / "gain"
    launch(2, config, recipe, path, report, job=measure_in_training, logs=tmp_path / "logs").succeeded()
    reports = [json.loads(Path(f"{report}-{rank}.json").read_text()) for rank in (0, 1)]

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    use_template(tokenizer, "chatml")
    variant_rows = variants(path, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = system_gain(model, variant_rows)
    held_out = prepare(load_recipe(recipe), tokenizer).validation.dataset
    assert len(held_out) % 16  # two batches of 8: some places hold a row that is no one's to count
    losses, tokens = 0.0, 0
    for row in held_out:
        ids, labels = torch.as_tensor(row["input_ids"])[None], torch.as_tensor(row["labels"])
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].double().log_softmax(-1)
        trained = labels[1:] != -100
        losses -= float(scores[trained].gather(1, labels[1:][trained, None]).sum())
        tokens += int(trained.sum())
    pieces = [piece for row in variant_rows for variant in row.all for piece in variant]
    plan = make_batches([len(piece.ids) for piece in pieces], [1] * len(pieces), 700, 10_000)
    assert len(plan) % 2 == 1  # so one rank has to score a batch more than it has
    assert [rank["forwards"] for rank in reports] == [len(plan) // 2 + 1] * 2
    for rank in reports:
        # ZeRO-3 keeps weights of a few numbers whole once they are used: the norms
        whole = {name: value.numel() for name, value in model.named_parameters() if config is None or "norm" in name}
        assert rank["held"] == sum(whole.values())
        np.testing.assert_allclose(rank["values"], expected.values, atol=1e-5)
        assert rank["record"] == reports[0]["record"]
        assert rank["evaluation"]["eval_loss"] == pytest.approx(losses / tokens, rel=1e-5)
        assert rank["evaluation"]["eval_system_gain"] == pytest.approx(expected.overall.gain.mean, abs=1e-5)
        assert rank["alone"] == reports[0]["alone"]
        assert rank["record"]["overall"]["gain"]["low"] == pytest.approx(expected.overall.gain.low, abs=1e-5)
