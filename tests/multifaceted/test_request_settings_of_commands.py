"""Request settings of the collection and the bench: nulls, renamed fields, and the names of the commands' options."""

import json
from pathlib import Path
from typing import Any

import pytest
from bench_runs import bench_row, command, judging, lines, write_lines
from collection_runs import good_everything as good_author
from collection_runs import run_with, written
from scripted_author import turns
from scripted_server import Asked, Reply, error, said, served

RIVERS = [turns("Tell me of rivers.")]
ROWS = [bench_row(0, rubric_count=1)]
GRADES = judging(lambda row, rubric, time: "Well. [RESULT] 4")
NULLS = ("--temperature", "null", "--top-p", "null", "--repetition-penalty", "null")
JUDGES_NULLS = ("--judge-temperature", "null", "--judge-top-p", "null")


async def author(asked: Asked) -> Reply:
    return said(good_author(asked))


async def has_no_system_role(asked: Asked) -> Reply:
    if asked.body["messages"][0]["role"] == "system":
        return error(400, "Only user and assistant roles are supported!")
    return await author(asked)


def test_every_stage_of_the_collection_can_send_nothing_but_messages(tmp_path: Path) -> None:
    nulls = {"temperature": None, "top_p": None, "seed": None, "extra": {"max_tokens": None}}
    stages = dict.fromkeys(("screen", "propose", "describe", "message", "answer"), nulls)
    _, asked = run_with(author, tmp_path, RIVERS, sets_per_instruction=1, filter={"model": True}, **stages)
    assert [set(request.body) for request in asked] == [{"model", "messages"}] * 5
    assert written(tmp_path)


def test_the_collection_merges_the_system_message_for_a_model_without_the_role(tmp_path: Path) -> None:
    done, _ = run_with(has_no_system_role, tmp_path, RIVERS, sets_per_instruction=1)
    assert not done.stats.written
    assert done.counts.advice == "If the model has no system role, set `system_role: merge_into_user`."
    _, asked = run_with(has_no_system_role, tmp_path, RIVERS, sets_per_instruction=1, system_role="merge_into_user")
    (row,) = written(tmp_path)
    assert asked[-1].body["messages"] == [{"role": "user", "content": f"{row['system']}\n\nTell me of rivers."}]


def bench(folder: Path, *more: str | Path) -> int:
    data = write_lines(folder / "rows.jsonl", ROWS)
    return command("--model", "m", "--data", data, "--judge", "judge", "--runs", "1", "--output-dir", folder, *more)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "bench.json").read_text("utf-8"))


def test_the_bench_does_not_send_null_fields_and_records_them_as_null(tmp_path: Path) -> None:
    renamed = '{"max_tokens": null, "max_completion_tokens": 4096}'
    with served(GRADES) as server:
        servers = ("--server", server.url, "--judge-server", server.url)
        assert bench(tmp_path, *servers, *NULLS, *JUDGES_NULLS, "--judge-extra", renamed) == 0
        asked = [request.body for request in server.asked if "messages" in request.body]
    (answer,) = (body for body in asked if body["model"] == "m")
    judgement = asked[-1]  # after the first contact
    assert set(answer) == {"model", "messages", "max_tokens"}
    assert {name: value for name, value in judgement.items() if name != "messages"} == {
        "model": "judge",
        "max_completion_tokens": 4096,
    }
    bench_record = record(tmp_path)
    nulls = {"temperature": None, "top_p": None}
    assert bench_record["decoding"] == {"max_tokens": 1024, "repetition_penalty": None, **nulls}
    assert {name: bench_record["judge"][name] for name in ("max_tokens", *nulls)} == {"max_tokens": 4096, **nulls}
    assert "the judge answers with max_tokens 4096, temperature not sent, top_p not sent; in the" in str(
        bench_record["deviations"]
    )


def test_a_batch_file_for_a_reasoning_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = write_lines(tmp_path / "answers.jsonl", [{**ROWS[0], "response": "r"}])
    given = ("--responses", answers)
    assert bench(tmp_path, *given, "--batch-out", tmp_path / "first.jsonl") == 0
    (refused,) = lines(tmp_path / "first.jsonl")
    assert {"max_tokens", "temperature", "top_p"} <= set(refused["body"])
    message = "Unsupported parameter: 'max_tokens' is not supported with this model."
    body = {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}
    response = {"custom_id": refused["custom_id"], "response": {"status_code": 400, "body": body}, "error": None}
    capsys.readouterr()
    assert bench(tmp_path, *given, "--batch-in", write_lines(tmp_path / "errors.jsonl", [response])) == 2
    shown = capsys.readouterr().err
    assert """--judge-extra '{"max_completion_tokens": 1024}'. Then write the batch again, without the file""" in shown
    extra = ("--judge-extra", '{"max_completion_tokens": 1024}')
    assert bench(tmp_path, *given, *JUDGES_NULLS, *extra, "--batch-out", tmp_path / "second.jsonl") == 0
    (line,) = lines(tmp_path / "second.jsonl")
    assert set(line["body"]) == {"model", "messages", "max_completion_tokens"}


@pytest.mark.parametrize(
    ("who", "refusal", "advice"),
    [
        (
            "m",
            Reply(422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "repetition_penalty"], "msg": "No"}]}),
            "Leave it out: --repetition-penalty null.",
        ),
        ("m", error(400, "Unsupported value: 'temperature'", param="temperature"), "Leave it out: --temperature null."),
        ("judge", error(400, "'top_p' is not supported with this model."), "Leave it out: --judge-top-p null."),
        (
            "judge",
            error(400, "`temperature` and `top_p` cannot both be specified for this model. Please use only one."),
            "Leave out one of them: --judge-temperature null or --judge-top-p null.",
        ),
        ("judge", error(400, "Unknown parameter: top_k"), """Leave it out: --judge-extra '{"top_k": null}'."""),
    ],
)
def test_a_refused_parameter_is_named_as_the_option_that_leaves_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], who: str, refusal: Reply, advice: str
) -> None:
    async def script(asked: Asked) -> Reply:
        return refusal if asked.body["model"] == who else await GRADES(asked)

    with served(script) as server:
        servers = ("--server", server.url, "--judge-server", server.url)
        assert bench(tmp_path, *servers, "--judge-extra", '{"top_k": 5}') == 2
    shown = capsys.readouterr().err
    assert advice in shown
    assert "system-role" not in shown


@pytest.mark.parametrize("key", [(), ("--judge-key-variable", "KEY_OF_THE_JUDGE")])
def test_a_judge_shows_what_it_refuses_before_the_model_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: tuple[str, ...]
) -> None:
    monkeypatch.setenv("KEY_OF_THE_JUDGE", "k")

    async def script(asked: Asked) -> Reply:
        if "messages" not in asked.body:
            return Reply(body={"data": [{"id": "judge"}]})
        return error(400, "Unsupported parameter", param="top_p") if "top_p" in asked.body else await GRADES(asked)

    with served(script) as server:
        servers = ("--server", server.url, "--judge-server", server.url, *key)
        assert bench(tmp_path, *servers) == 2
        assert "Leave it out: --judge-top-p null." in capsys.readouterr().err
        assert {request.body["model"] for request in server.asked if "messages" in request.body} == {"judge"}
        assert bench(tmp_path, *servers, "--judge-top-p", "null", "--top-p", "null") == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--extra", '{"temperature": 0.2}'), "--extra: `temperature`: not set here: write --temperature."),
        (("--extra", '{"repetition_penalty": 2}'), "`repetition_penalty`: not set here: write --repetition-penalty."),
        (
            ("--judge-extra", '{"stream": true}'),
            "--judge-extra: `stream`: not supported: each answer is read in one piece",
        ),
        (("--judge-extra", '{"max_tokens": 9}'), "`max_tokens`: not set here: write --judge-max-tokens."),
        (("--judge-extra", '{"max_completion_tokens": 0}'), "`max_completion_tokens`: must be an integer >= 1"),
        (("--top-p", "nul"), "--top-p nul: found 'nul'. Allowed: a number "),
        (("--temperature", "nan"), "--temperature nan: found 'nan'. Allowed: a number "),
    ],
)
def test_contradictory_settings_are_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    server = "http://127.0.0.1:9/v1"
    assert bench(tmp_path, "--server", server, "--judge-server", server, *more) == 2
    assert message in capsys.readouterr().err
