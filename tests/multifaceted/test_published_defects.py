"""Documented defects of the published JANUS scripts, each as a test that this project does not have it.

Those of training first, then those of the benchmark. Some are tested at length elsewhere; here each stands by its name.
"""

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from bench_runs import FIRST_CONTACT, ROOT, bench_row, command, judging, lines, place_of, write_lines
from scripted_server import Asked, Reply, ScriptedServer, said, served

from train.data.chat.template import use_template
from train.data.loss_mask import encode
from train.data.sources.formats import convert, detect
from train.errors import UserError
from train.evaluation.models.local import LocalGenerator
from train.evaluation.models.options import LocalModel
from train.recipe import load_recipe

# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ["", None, "Be brief."])
def test_an_empty_system_message_drops_nothing_else(mistral_tokenizer_v1, system: str | None) -> None:
    """The original code wrote no `[INST] ` where the system message was empty."""
    tokenizer = mistral_tokenizer_v1()
    use_template(tokenizer, "mistral-system")
    row = {"system": system, "prompt": "Why?", "output": "So."}
    messages, _ = convert(row, detect(row))
    (encoded,) = encode(tokenizer, messages)
    expected = f"<s>[INST] {'Be brief.' + chr(10) if system else ''}Why? [/INST] So.</s>"
    # This tokenizer writes the blank before a text's first word also behind <s>.
    assert tokenizer.decode(encoded.input_ids).replace("<s> ", "<s>") == expected
    # The same for a message that is there and empty, as an API's caller may send it: [INST] stays.
    rendered = tokenizer.apply_chat_template(
        [{"role": "system", "content": ""}, {"role": "user", "content": "Why?"}], tokenize=False
    )
    assert rendered.startswith("<s>[INST] ")
    assert rendered.endswith("Why? [/INST]")


def test_a_model_is_prompted_in_the_template_that_it_was_trained_in(tiny_chat_model: Path) -> None:
    """The published DPO and ORPO models were trained on ChatML and prompted with [INST]."""
    opened = LocalGenerator(LocalModel(str(tiny_chat_model)))
    question = [{"role": "system", "content": "river"}, {"role": "user", "content": "stone"}]
    prompt = opened.tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    (trained,) = encode(opened.tokenizer, [*question, {"role": "assistant", "content": "cloud"}])
    text = opened.tokenizer.decode(trained.input_ids)
    assert text.startswith(prompt)
    assert text.removeprefix(prompt).startswith("cloud<|im_end|>")
    learnt = [id for id, label in zip(trained.input_ids, trained.labels, strict=True) if label != -100]
    assert opened.tokenizer.decode(learnt).startswith("cloud<|im_end|>")


@pytest.mark.parametrize("instruction", ["prompt", "instruction"])
def test_both_names_of_the_instruction_are_read(instruction: str) -> None:
    """A published configuration names a field `instruction`, where the data has `prompt`."""
    row = {"system": "s", instruction: "i", "output": "o"}
    messages, _ = convert(row, detect(row))
    assert [(message["role"], message["content"]) for message in messages] == [
        ("system", "s"),
        ("user", "i"),
        ("assistant", "o"),
    ]


@pytest.mark.parametrize("value", ["{{ bos_token }}", "{chosen}", "[INST] {prompt} [/INST]", "[INST]"])
def test_a_value_of_another_yaml_type_is_an_error_with_its_line(recipe_file, value: str) -> None:
    """A published `chosen_format: {...}` is a mapping to YAML, and the trainer stumbled over it much later."""
    path = recipe_file()
    text = path.read_text("utf-8").replace("template: chatml", f"template: {value}")
    path.write_text(text, "utf-8")
    line = next(number for number, line in enumerate(text.splitlines(), 1) if "template:" in line)
    with pytest.raises(UserError, match=rf"{path.name}:{line}\b"):
        load_recipe(path)


def test_every_file_that_the_readme_and_the_recipes_name_exists() -> None:
    """Published commands name files that are called otherwise."""
    texts = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "recipes").rglob("*.md"),
        *(ROOT / "recipes").rglob("*.yaml"),
    ]
    missing = []
    count = 0
    for text in texts:
        for name in re.findall(
            r"(?<![\w/.])(?:recipes|scripts|accelerate_configs|ds_configs|train)/[\w./-]+\.(?:yaml|py|jsonl|json|md|png)\b",
            text.read_text("utf-8"),
        ):
            count += 1
            if not (ROOT / name).is_file():
                missing.append(f"{text.name}: {name}")
    assert count > 50
    assert not missing


# --- the benchmark ----------------------------------------------------------------------------------------------------


def grade(row: int, rubric: int, time: int) -> str:
    return f"[RESULT] {(row + rubric) % 5 + 1}"


def options(server: ScriptedServer, data: Path, output: Path, model: str = "m") -> list[str]:
    return [
        "--model", model, "--server", server.url, "--data", str(data), "--output-dir", str(output),
        "--judge", "judge", "--judge-server", server.url, "--runs", "1",
    ]  # fmt: skip


def test_no_debug_switch_scores_only_a_part_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DEBUG was left on, and 10 random rows were scored as if they were the whole."""
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(23)])
    with served(judging(grade), models=["judge"]) as server:
        assert command(*options(server, data, tmp_path / "out")) == 0
        questions = [request.prompt for request in server.asked if request.body["model"] == "judge"]
    questions.remove(FIRST_CONTACT)
    judged = Counter(map(place_of, questions))
    assert judged == {(row, rubric): 1 for row in range(23) for rubric in range(4)}
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert (record["score"]["scored"], record["score"]["of"], record["rows_of_the_data"]) == (23, 23, 23)
    assert "not the whole bench" not in capsys.readouterr().out


def test_documented_options_exist_and_do_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--N` was documented, and `--n` defined."""
    assert command("--help") == 0
    accepted = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    documents = (ROOT / "README.md", ROOT / "scripts" / "evaluate.py", ROOT / "train" / "evaluation" / "bench.py")
    for document in documents:
        for block in re.findall(r"evaluate\.py bench .*?(?=\n\n|\n```|\"\"\")", document.read_text("utf-8"), re.DOTALL):
            used = set(re.findall(r"(?<!\w)--[\w-]+", block))
            assert used
            assert used <= accepted
    assert command("--N", "4") == 2


def test_best_of_n_keeps_all_n_answers(tmp_path: Path) -> None:
    """The list of N answers was overwritten by the one that was picked, in the middle of the loop over it."""
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(2)])

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] != "judge":
            return said(f"<{asked.times}>")
        if asked.prompt == FIRST_CONTACT:
            return said("Feedback")
        answer = asked.prompt.split("### Answer to be graded\n")[1]
        return said(f"[RESULT] {answer[1]}" if answer[1] in "123" else "[RESULT] 1")

    with served(script, models=["judge"]) as server:
        assert command(*options(server, data, tmp_path / "out"), "--best-of", "4", "--pick-by", "all-runs") == 0
    for row in lines(tmp_path / "out" / "bench_rows.jsonl"):
        texts = [answer["response"] for answer in row["answers"]]
        assert sorted(texts) == ["<0>", "<1>", "<2>", "<3>"]
        assert row["response"] == texts[row["picked"]] == "<3>"
        assert row["score"] == 3


def test_rows_need_no_column_of_ids(tmp_path: Path) -> None:
    """The scripts read a column `id`, which the published data lacks."""
    rows = [bench_row(number) for number in range(3)]
    assert all("id" not in row for row in rows)
    with served(judging(grade)) as server:
        assert command(*options(server, write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "out")) == 0
    assert len({row["id"] for row in lines(tmp_path / "out" / "bench_rows.jsonl")}) == 3


def test_integer_ids_match_the_keys_of_json(tmp_path: Path) -> None:
    """Ids were whole numbers in the data and texts as JSON's keys, so that no response was found."""
    rows = {str(number): bench_row(number, id=number) for number in (468, 7)}
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    given = write_lines(tmp_path / "given.jsonl", [{"id": 7, "response": "seven"}, {"id": "468", "response": "many"}])
    with served(judging(grade)) as server:
        arguments = ["--model", "m", "--responses", given, "--data", data, "--output-dir", tmp_path / "out"]
        assert command(*arguments, "--judge", "judge", "--judge-server", server.url, "--runs", "1") == 0
    responses = {row["id"]: row["response"] for row in lines(tmp_path / "out" / "bench_rows.jsonl")}
    assert responses == {"468": "many", "7": "seven"}


def test_responses_of_one_model_are_never_in_anothers_file(tmp_path: Path) -> None:
    """Rows were copied shallowly, so the responses of the model before leaked into the next one's file."""
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(3)])

    async def script(asked: Asked) -> Reply:
        if asked.body["model"] == "judge":
            return said("[RESULT] 3")
        return said(f"{asked.body['model']} says so")

    with served(script) as server:
        for output in ("apart", "same"):  # each in a folder of its own, and all in one
            for model in ("first", "second", "first"):
                folder = tmp_path / output / (model if output == "apart" else "")
                assert command(*options(server, data, folder, model)) == 0
                rows = lines(folder / "bench_rows.jsonl")
                texts = [answer["response"] for row in rows for answer in row["answers"]]
                assert texts == [f"{model} says so"] * 3
                assert json.loads((folder / "bench.json").read_text())["model"] == model


def test_a_missing_score_breaks_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One None among the scores ended the aggregation with a traceback."""
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(2)])

    def silent(row: int, rubric: int, time: int) -> str:
        return "no verdict" if (row, rubric) == (0, 0) or row == 1 else f"[RESULT] {rubric + 1}"

    with served(judging(silent)) as server:
        assert command(*options(server, data, tmp_path / "out"), "--retries", "0") == 0
    record: dict[str, Any] = json.loads((tmp_path / "out" / "bench.json").read_text())
    none = {"low": None, "high": None, "interval": "none: too few"}
    assert record["score"] == {"mean": 3.0, "scored": 1, "of": 2, "rows": 1} | none
    assert record["missing"]["judgements_missing"]["unparsable"] == 5
    everything_missing = tmp_path / "nothing"
    shutil.copytree(tmp_path / "out", everything_missing)  # an earlier run had a score, and a plot of it
    assert (everything_missing / "bench.png").is_file()
    (everything_missing / "bench.sqlite").unlink()
    capsys.readouterr()
    with served(judging(lambda row, rubric, time: "no verdict")) as server:
        assert command(*options(server, data, everything_missing), "--retries", "0") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("warning: --judge judge: 8 of 8 verdicts could not be read (100%). Reasons: 8 no score at")
    record = json.loads((everything_missing / "bench.json").read_text())
    assert record["score"] == {"mean": None, "scored": 0, "of": 2, "rows": 0} | none
    report = (everything_missing / "report.md").read_text()
    assert "**m: no score**" in report
    assert "bench.png" not in report
    assert not (everything_missing / "bench.png").exists()


def test_the_batch_mode_aggregates_scores(tmp_path: Path) -> None:
    """The batch mode wrote requests and read answers, and never made a score of them."""
    data = write_lines(tmp_path / "rows.jsonl", [bench_row(number) for number in range(3)])
    given = [{"system": row["system"], "prompt": row["prompt"], "response": "r"} for row in lines(data)]
    answers = write_lines(tmp_path / "given.jsonl", given)
    arguments = [
        "--model",
        "m",
        "--responses",
        answers,
        "--data",
        data,
        "--output-dir",
        tmp_path / "out",
        "--judge",
        "judge",
    ]
    assert command(*arguments, "--batch-out", tmp_path / "batch.jsonl") == 0
    output = [
        {
            "custom_id": line["custom_id"],
            "response": {
                "status_code": 200,
                "body": said(grade(*place_of(line["body"]["messages"][0]["content"]), 0)).body,
            },
            "error": None,
        }
        for line in lines(tmp_path / "batch.jsonl")
    ]
    assert command(*arguments, "--batch-in", write_lines(tmp_path / "output.jsonl", output)) == 0
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    expected = [sum((row + rubric) % 5 + 1 for rubric in range(4)) / 4 for row in range(3)]
    assert record["score"]["mean"] == pytest.approx(sum(expected) / 3)
    assert record["complete"] is True
