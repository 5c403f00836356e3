"""Request settings of SYSGEN: null fields are not sent, the token limit under another name, no system role."""

import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_server import Asked, Reply, error, said, served
from sysgen_runs import configuration, good_everything, lines, only_row, question, run_with

from train.errors import UserError
from train.sysgen.config import load_config
from train.sysgen.run import run

STAGES = ("generate", "verify", "answer", "judge")


async def good(asked: Asked) -> Reply:
    return said(good_everything(asked))


async def has_no_system_role(asked: Asked) -> Reply:
    if asked.body["messages"][0]["role"] == "system":
        return error(400, "System role not supported")
    return said(good_everything(asked))


def test_requests_can_consist_of_model_and_messages_alone(tmp_path: Path) -> None:
    nulls = {"temperature": None, "top_p": None, "seed": None, "extra": {"max_tokens": None, "top_k": None}}
    done, asked = run_with(good, tmp_path, [question()], gates={"judge": True}, **dict.fromkeys(STAGES, nulls))
    assert done.stats.written == 1
    assert [set(request.body) for request in asked] == [{"model", "messages"}] * 4


def test_each_stage_takes_any_field_in_extra(tmp_path: Path) -> None:
    fields = {"max_completion_tokens": 4096, "reasoning_effort": "low", "temperature": 1}
    stage = {"temperature": None, "extra": {**fields, "max_tokens": None}}
    _, asked = run_with(good, tmp_path, [question()], gates={"judge": True}, **dict.fromkeys(STAGES, stage))
    assert [
        {name: request.body[name] for name in request.body if name not in ("model", "messages")} for request in asked
    ] == [fields] * 4


def test_a_server_that_only_streams_gets_streaming_requests(tmp_path: Path) -> None:
    source = tmp_path / "source.jsonl"
    source.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    with served(good) as server:
        servers = [{"base_url": server.url, "stream": True}]
        done = run(load_config(configuration(tmp_path, server.url, source, servers=servers)))
        assert [request.body["stream"] for request in server.asked] == [True] * 3
    assert done.stats.written == 1


def test_without_a_system_role_requests_are_merged_and_rows_are_the_same(tmp_path: Path) -> None:
    _, asked = run_with(good, tmp_path, [question()])
    with_role = only_row(tmp_path)
    changes = {"system_role": "merge_into_user", "output_dir": str(tmp_path / "merged" / "out")}
    done, merged = run_with(has_no_system_role, tmp_path, [question()], **changes)
    assert only_row(tmp_path / "merged") == with_role
    assert with_role["messages"][0]["role"] == "system"
    assert [request.body["messages"] for request in merged[:2]] == [request.body["messages"] for request in asked[:2]]
    system, user = asked[2].body["messages"]
    assert merged[2].body["messages"] == [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}]
    assert done.counts.failed == 0


def test_the_error_ends_with_the_setting_of_a_refused_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from sysgen import main

    source = tmp_path / "source.jsonl"
    arguments = sys.argv
    with served(has_no_system_role) as server:
        path = configuration(tmp_path, server.url, source)
        source.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
        try:
            sys.argv = ["sysgen.py", "--config", str(path)]
            assert main() == 2
            shown = capsys.readouterr().err
            assert shown.startswith("error: no row was written")
            assert "400 Said: System role not supported" in shown
            assert "If the model has no system role, set `system_role: merge_into_user`." in shown
            sys.argv.append("system_role=merge_into_user")
            assert main() == 0
        finally:
            sys.argv = arguments
    assert len(lines(tmp_path / "out" / "data" / "rows.jsonl")) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generate": {"extra": {"temperature": 0.2}}}, "generate.extra.temperature: not set here: write `generate.te"),
        ({"verify": {"extra": {"max_tokens": 5}}}, "verify.extra.max_tokens: not set here: write `verify.max_tokens`."),
        ({"answer": {"top_p": 0.9, "extra": {"top_p": 0.5}}}, "answer.extra.top_p: not set here: write `answer.top_p`"),
        ({"judge": {"extra": {"max_completion_tokens": "many"}}}, "judge.extra.max_completion_tokens: must be an int"),
        ({"judge": {"extra": {"max_completion_tokens": True}}}, "judge.extra.max_completion_tokens: must be an integ"),
        ({"answer": {"extra": {"n": 2}}}, "answer.extra.n: not supported: each request gets one answer."),
        (
            {"answer": {"extra": {"stream": None}}},
            "answer.extra.stream: not supported: each answer is read in one piece",
        ),
        ({"system_role": "turn"}, "system_role: found 'turn'. Allowed: native, merge_into_user."),
    ],
)
def test_contradictory_settings_are_an_error(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "source.jsonl").touch()
    path = configuration(tmp_path, "http://127.0.0.1:9/v1", tmp_path / "source.jsonl", **changes)
    with pytest.raises(UserError) as failure:
        load_config(path)
    assert message in str(failure.value)
