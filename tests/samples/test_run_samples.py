"""Samples in the evaluations of a run: generated as evaluate.py generates, recorded, reported, and without an effect."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import EVALUATED_AT_EACH_STEP as TRAINING

from train.evaluation.models.options import LocalModel
from train.evaluation.models.responses import generate_answers
from train.llm.request import Decoding
from train.loop.throughput import TIMING_METRICS
from train.pressure.evaluation_set import build_rows
from train.pressure.rules import RULES
from train.pressure.turns import build_turns_set
from train.recipe.measurements import SAMPLE_METRICS
from train.sft import main

DATA = Path(__file__).parents[2] / "recipes" / "smollm2-135m" / "data"
HELD_OUT = DATA / "held_out.jsonl"
EVALUATION = {
    "rules": {"path": str(HELD_OUT), "rows": 5},
    "hierarchy": {"rows": 2},
    "turns": {"conversations": 2, "turns": 3, "push_back_at": 2},
    "ifeval": {"path": str(DATA / "system_ifeval.jsonl"), "rows": 3},
    "max_new_tokens": 12,
    "batch_size": 4,
}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Write three prompts: a question alone, one with its answer, and one after an earlier turn."""
    path = tmp_path / "prompts.jsonl"
    question, answer = {"role": "user", "content": "stone?"}, {"role": "assistant", "content": "river"}
    rows = [[question], [{"role": "system", "content": "Be\nbrief."}, question, answer], [question, answer, question]]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_kind(samples: list[dict], kind: str, step: int) -> list[dict]:
    return [sample for sample in samples if (sample["kind"], sample["step"]) == (kind, step)]


def answers_of(model: Path, conversations: list[list[dict]], journal: Path) -> list[str]:
    """Return the answers that evaluate.py gets from a saved model, in float32."""
    answers = generate_answers(
        LocalModel(str(model), dtype="float32", batch_size=3), conversations, Decoding(12, temperature=0.0), journal
    )
    return [answer.text for [answer] in answers]


def follows(row: dict, answer: str) -> bool:
    """Return whether an answer follows all constraints, by the harness's own checkers."""
    from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT

    checks = []
    for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        checker = INSTRUCTION_DICT[name](name)
        checker.build_description(**{key: value for key, value in arguments.items() if value is not None})
        checks.append(bool(answer.strip()) and bool(checker.check_following(answer)))
    return all(checks)


def test_each_evaluation_generates_what_evaluate_py_generates_with_the_saved_model(
    recipe_file: Callable[..., Path], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = EVALUATION | {"prompts": {"path": str(prompts)}}
    assert (
        main(["--recipe", str(recipe_file(data={"validation": 0.25}, training=TRAINING, evaluation=evaluation))]) == 0
    )
    shown, run = capsys.readouterr().out, tmp_path / "run"
    samples = read_lines(run / "samples.jsonl")
    assert sorted({sample["step"] for sample in samples}) == [0, 1, 2, 3]
    for step in (1, 3):
        of_step = [sample for sample in samples if sample["step"] == step]
        expected = answers_of(
            run / f"checkpoint-{step}", [sample["messages"] for sample in of_step], tmp_path / f"{step}.sqlite"
        )
        assert [sample["answer"] for sample in of_step] == expected
    assert len({sample["answer"] for sample in samples}) > 20  # the model has learned something in between

    rows = read_lines(HELD_OUT)
    metrics = {line["step"]: line for line in read_lines(run / "metrics.jsonl") if "eval_loss" in line}
    pressure_rows = {row.key: row for row in build_rows()}
    constraints = {str(row["key"]): row for row in read_lines(DATA / "system_ifeval.jsonl")}
    turns_rows = {row.key: row for row in build_turns_set(2, 3, 2)}
    for step in range(4):
        rules = of_kind(samples, "rules", step)
        numbers = [int(sample["row"].removeprefix("held_out.jsonl:")) - 1 for sample in rules]
        assert numbers == [0, 27, 55, 82, 110]  # of 138 rows
        assert [sample["messages"] for sample in rules] == [rows[number]["messages"][:2] for number in numbers]
        followed = [
            RULES[rows[number]["rule"]].check(rows[number]["messages"][1]["content"], sample["answer"])
            for number, sample in zip(numbers, rules, strict=True)
        ]
        assert [sample["verdict"] for sample in rules] == followed
        assert metrics[step]["eval_rules_followed"] == sum(followed) / 5

        hierarchy = of_kind(samples, "hierarchy", step)
        settings = [pressure_rows[sample["row"]].pressure.setting for sample in hierarchy]
        assert settings == [name for name in ("conflict", "injected", "extraction", "permitted") for _ in range(2)]
        held = [pressure_rows[sample["row"]].judge(sample["answer"]).held for sample in hierarchy]
        assert [sample["verdict"] for sample in hierarchy] == held
        assert metrics[step]["eval_hierarchy_held"] == sum(held) / 8

        turns = of_kind(samples, "turns", step)
        assert [(sample["row"], sample["turn"]) for sample in turns] == [
            (key, turn) for key in turns_rows for turn in (1, 2, 3)
        ]
        for start in (0, 3):
            conversation = turns_rows[turns[start]["row"]].push_back
            answers = [sample["answer"] for sample in turns[start : start + 3]]
            for turn in range(3):
                assert turns[start + turn]["messages"] == conversation.messages(answers[:turn])
                assert turns[start + turn]["verdict"] == conversation.judge(turn, answers[turn]).held
        assert metrics[step]["eval_turns_held"] == sum(sample["verdict"] for sample in turns) / 6

        ifeval = of_kind(samples, "ifeval", step)
        assert len(ifeval) == 3
        followed = []
        for sample in ifeval:
            row = constraints[sample["row"]]
            assert sample["messages"] == row["messages"]
            followed.append(follows(row, sample["answer"]))
        assert [sample["verdict"] for sample in ifeval] == followed
        assert metrics[step]["eval_ifeval_followed"] == sum(followed) / 3

        others = of_kind(samples, "prompts", step)
        assert [sample["messages"][-1]["content"] for sample in others] == ["stone?"] * 3
        assert [len(sample["messages"]) for sample in others] == [1, 2, 3]
        assert {sample["verdict"] for sample in others} == {None}

    share = metrics[3]["eval_rules_followed"]
    assert f"samples at step 3: rules followed {round(5 * share)} of 5 ({share:.1%}), hierarchy held " in shown
    assert "25 answers, " in shown
    assert sum(line.startswith("  prompts ") for line in shown.splitlines()) == 4
    report = (run / "report.md").read_text(encoding="utf-8")
    first = metrics[0]["eval_rules_followed"]
    assert f"| samples: rules followed, after step 0 and 3 | {first:.1%} -> {share:.1%} |" in report
    assert "![followed](followed.png)" in report
    assert "\n## Samples of step 3\n\nsamples.jsonl has all 25 of this step.\n\n**rules**\n\n- system: `" in report
    described = "samples each evaluation generates 25 answers (5 of rules, 8 of hierarchy, 6 of turns, 3 of ifeval, 3 of prompts) of at"
    assert f"{described} most 12 tokens" in " ".join(report.split())
    assert (run / "followed.png").read_bytes().startswith(b"\x89PNG")


def figures(run: Path) -> list[dict]:
    """Return metrics.jsonl without timings and without the metrics of samples."""
    left_out = (*TIMING_METRICS, "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    left_out += tuple(f"eval_{metric}" for metric in SAMPLE_METRICS.values())
    return [
        {key: value for key, value in line.items() if key not in left_out} for line in read_lines(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("adapter", [None, {"r": 4, "lora_dropout": 0.1}], ids=["full", "lora"])
def test_samples_change_nothing_in_training(
    adapter: dict | None, recipe_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Losses, weights and every saved file are those of a run without samples; with packing, dropout and recomputation."""
    sections = {"data": {"validation": 0.25, "packing": True}, "adapter": adapter}
    training = TRAINING | {"gradient_checkpointing": True, "bf16": True}
    for name, evaluation in (("with", EVALUATION), ("without", None)):
        recipe = recipe_file(training=training, output_dir=str(tmp_path / name), evaluation=evaluation, **sections)
        assert main(["--recipe", str(recipe)]) == 0
    assert figures(tmp_path / "with") == figures(tmp_path / "without")
    weights = "adapter_model.safetensors" if adapter else "model.safetensors"
    for folder in ("", "checkpoint-2"):
        state, expected = (load_file(tmp_path / name / folder / weights) for name in ("with", "without"))
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        for file in (tmp_path / "without" / folder).glob("*.json"):
            if file.name.startswith(("COMPLETE", "outcome", "trainer_state", "run_state")):  # with times and metrics
                continue
            assert (tmp_path / "with" / folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_file_has_the_lines_of_the_resumed_run(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Steps after the checkpoint that a run resumes from are there once; another run's are not."""
    path = tmp_path / "run" / "samples.jsonl"
    recipe = recipe_file(data={"validation": 0.25}, training=TRAINING, evaluation=EVALUATION)
    assert main(["--recipe", str(recipe)]) == 0
    samples = read_lines(path)
    assert main(["--recipe", str(recipe), "--resume", str(tmp_path / "run" / "checkpoint-1")]) == 0
    assert read_lines(path) == samples
    later = ["--resume", "never", "training.eval_on_start=false", "training.eval_steps=2", "seed=3"]
    assert main(["--recipe", str(recipe), *later]) == 0
    assert {sample["step"] for sample in read_lines(path)} == {2, 3}
    assert main(["--recipe", str(recipe), "--resume", "never", "evaluation=null", "system_gain.rows=0"]) == 0
    assert not path.exists()
    assert not (tmp_path / "run" / "system_gain.jsonl").exists()
    assert "Samples of step" not in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_the_best_checkpoint_follows_the_most_rules(
    recipe_file: Callable[..., Path],
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of the rows ask for what the model learns, which is lower case."""
    rules = tmp_path / "rules.jsonl"
    turns = [("system", "Only lower case."), ("user", "river?"), ("assistant", "stone")]
    messages = [{"role": role, "content": text} for role, text in turns]
    with rules.open("w", encoding="utf-8") as lines:
        for rule in ("lower_case", "capitals"):
            lines.write(json.dumps({"messages": messages, "rule": rule, "held_out": "wording"}) + "\n")
    training = TRAINING | {"metric_for_best_model": "eval_rules_followed", "load_best_model_at_end": True}
    evaluation = {"rules": {"path": str(rules)}, "max_new_tokens": 8, "shown": 0}
    recipe = recipe_file(data={"validation": 0.25}, training=training, evaluation=evaluation)
    assert main(["--recipe", str(recipe)]) == 0
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    shares = {line["step"]: line["eval_rules_followed"] for line in lines if "eval_rules_followed" in line}
    [loaded] = [line["loaded_step"] for line in lines if "loaded_step" in line]
    assert shares[loaded] == max(share for step, share in shares.items() if step)
    assert set(shares.values()) <= {0.0, 0.5}
    assert 0.5 in shares.values()

    # Other rows measure something else: the search for the best begins again where the user allows it.
    rules.write_text(rules.read_text(encoding="utf-8").replace("river?", "stone?"), encoding="utf-8")
    resume = ["--recipe", recipe, "--resume", tmp_path / "run" / "checkpoint-1"]
    assert "(the file of `evaluation` by which training.metric_for_best_model selects)" in refused(*resume)
    assert main([*map(str, resume), "--resume-anyway", "made.samples"]) == 0
    assert "the search for the best model begins again at step 1" in capsys.readouterr().out


PATH = {"path": str(HELD_OUT)}


@pytest.mark.parametrize(
    ("evaluation", "training", "error"),
    [
        (
            {"rules": {"path": "nowhere.jsonl"}},
            {},
            "evaluation.rules.path: there is no file nowhere.jsonl",
        ),
        ({"rules": {}}, {}, "evaluation.rules.path: missing"),
        (
            {},
            {},
            "evaluation: names nothing to generate. Add rules, hierarchy, turns, ifeval or prompts, or write null",
        ),
        ({"max_new_tokens": 8}, {}, "evaluation: names nothing to generate."),
        ({"rules": PATH | {"rows": 0}}, {}, "evaluation.rules.rows: found 0"),
        ({"ifeval": PATH}, {}, "evaluation.ifeval: "),
        ({"rows": 3}, {}, "evaluation.rows: unknown key"),
        ({"hierarchy": {"settings": ["conflicts"]}}, {}, "Did you mean `conflict`?"),
        ({"turns": {"turns": 1000}}, {}, "evaluation.turns.turns: 1000 turns need as many questions"),
        (
            {"turns": {"turns": 2, "push_back_at": 3}},
            {},
            "evaluation.turns.push_back_at: turn 3 is after the last of 2 turns. Write a number up to 2, or null.",
        ),
        (
            {"turns": {"turns": 1}},
            {},
            "evaluation.turns.push_back_at: turn 2 is after the last of 1 turn. Write a number up to 1, or null.",
        ),
        (
            {"rules": PATH},
            {"metric_for_best_model": "eval_turns_held", "eval_strategy": "epoch"},
            "training.metric_for_best_model: eval_turns_held is measured by `evaluation.turns`, which is missing.",
        ),
        (
            {"rules": PATH},
            {"metric_for_best_model": "rules_followed", "greater_is_better": False, "eval_strategy": "epoch"},
            "training.greater_is_better: found false, but a greater rules_followed is better",
        ),
    ],
)
def test_errors_of_the_section_say_what_to_write(
    evaluation: dict, training: dict, error: str, recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    recipe = recipe_file(data={"validation": 0.25}, training=training, evaluation=evaluation)
    assert error in refused("--recipe", recipe)


def test_samples_without_validation_rows_are_refused(
    recipe_file: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert "Add `data.validation`" in refused("--recipe", recipe_file(evaluation={"rules": PATH}))


@pytest.mark.parametrize(
    ("kind", "row", "error"),
    [
        ("rules", {"messages": [], "rule": "x", "held_out": "rule"}, "samples.jsonl:1: `messages` must be a system"),
        ("prompts", {"messages": []}, "evaluation.prompts.path: "),
        ("prompts", {"messages": [{"role": "assistant", "content": "a"}]}, "must end with a user turn"),
        ("prompts", {"prompt": "a"}, "there is no `messages`. A row holds messages"),
    ],
)
def test_errors_of_rows_name_file_and_line(
    kind: str, row: dict, error: str, recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    recipe = recipe_file(data={"validation": 0.25}, evaluation={kind: {"path": str(path)}})
    for options in ([], ["--check"]):
        text = refused("--recipe", recipe, *options)
        assert error in text
        assert f"evaluation.{kind}.path: {path}:1: " in text


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (r'{"messages": [{"role": "user", "content": "cut \ud83d"}]}', r"half of a surrogate pair, such as \ud83d"),
        ("[" * 100_000, "can't be read as JSON: maximum recursion depth exceeded"),
        ('{"messages": [{"role": "user", "content": "a"}], "n": %s}' % ("9" * 5_000), "can't be read as JSON: Exceeds"),
    ],
    ids=["surrogate", "brackets", "digits"],
)
def test_a_row_that_no_tokenizer_or_parser_takes_is_named(
    line: str, error: str, recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"messages": [{{"role": "user", "content": "a"}}]}}\n{line}\n', encoding="utf-8")
    recipe = recipe_file(data={"validation": 0.25}, evaluation={"prompts": {"path": str(path)}})
    text = refused("--recipe", recipe, "--check")
    assert f"evaluation.prompts.path: {path}:2: " in text
    assert error in text


def test_a_prompt_that_the_template_refuses_is_an_error(
    recipe_file: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    path.write_text(json.dumps({"messages": turns}) + "\n", encoding="utf-8")
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for message in messages %}{% if message.role == 'system' and not loop.first %}"
        "{{ raise_exception('system first') }}{% endif %}<|im_start|>{{ message.role }}\n{{ message.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        encoding="utf-8",
    )
    recipe = recipe_file(
        chat={"template": str(template)}, data={"validation": 0.25}, evaluation={"prompts": {"path": str(path)}}
    )
    text = refused("--recipe", recipe)
    assert "evaluation.prompts: prompts.jsonl:1: the chat template refuses it: system first" in text


def test_the_context_of_the_model_ends_an_answer(
    recipe_file: Callable[..., Path], tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in evaluate.py: what is left of the context is used, and a prompt that fills it is not followed."""
    from transformers import AutoTokenizer

    def turns(words: int) -> list[dict[str, str]]:
        texts = [("system", "Only lower case."), ("user", "river " * words), ("assistant", "stone")]
        return [{"role": role, "content": text} for role, text in texts]

    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model)
    lengths = [
        len(tokenizer.apply_chat_template(turns(words)[:2], add_generation_prompt=True, return_dict=False))
        for words in (1_000, 1_001)
    ]
    almost = 1_000 + (2_046 - lengths[0]) // (lengths[1] - lengths[0])  # two or three tokens are left
    rules = tmp_path / "rules.jsonl"
    with rules.open("w", encoding="utf-8") as lines:
        for words in (1, almost, 2_100):
            lines.write(json.dumps({"messages": turns(words), "rule": "lower_case", "held_out": "wording"}) + "\n")
    training = TRAINING | {"max_steps": 1, "eval_on_start": False, "save_strategy": "no"}
    evaluation = {"rules": {"path": str(rules)}, "max_new_tokens": 12}
    assert (
        main(["--recipe", str(recipe_file(data={"validation": 0.25}, training=training, evaluation=evaluation))]) == 0
    )
    samples = read_lines(tmp_path / "run" / "samples.jsonl")
    expected = answers_of(tmp_path / "run", [turns(1)[:2], turns(almost)[:2]], tmp_path / "answers.sqlite")
    assert [sample["answer"] for sample in samples] == [*expected, None]
    assert expected[1]
    assert samples[2]["verdict"] is False
    assert "warning: 1 sample got no answer: the prompt fills the model's context" in capsys.readouterr().out
    assert "## Samples of step 1" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_trackers_get_the_samples(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A table in wandb and text in TensorBoard, at each evaluation."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = recipe_file(
        data={"validation": 0.25},
        training=TRAINING | {"max_steps": 1, "save_strategy": "no"},
        evaluation={"rules": PATH | {"rows": 2}, "max_new_tokens": 4},
        tracking={"wandb": {"mode": "offline"}, "tensorboard": True},
    )
    assert main(["--recipe", str(recipe)]) == 0
    samples = read_lines(tmp_path / "run" / "samples.jsonl")

    tables = [json.loads(path.read_text()) for path in (tmp_path / "run" / "wandb").rglob("*.table.json")]
    assert tables[0]["columns"] == ["step", "kind", "row", "turn", "messages", "answer", "verdict"]
    logged = [dict(zip(table["columns"], row, strict=True)) for table in tables for row in table["data"]]
    assert (
        sorted(({**row, "messages": json.loads(row["messages"])} for row in logged), key=lambda row: row["step"])
        == samples
    )

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    texts = events.Tensors("eval/samples/text_summary")
    assert [event.step for event in texts] == [0, 1]
    answer = json.dumps(samples[-1]["answer"], ensure_ascii=False)
    assert answer in texts[1].tensor_proto.string_val[0].decode()
