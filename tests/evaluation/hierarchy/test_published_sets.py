"""Published sets with scripted servers: figures by hand, files that give them again, nothing asked twice."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from published_rows import write_realguardrails, write_tensortrust
from published_runs import FIRST_CONTACT, KEEPS, answers_everything, guards_a_door, sells_tea
from scripted_server import Asked, Reply, ScriptedServer, chat_reply, error, served

from train.errors import UserError
from train.evaluation.hierarchy.published_options import PublishedOptions
from train.evaluation.hierarchy.published_sets import measure_published_sets, read_published_sets
from train.evaluation.hierarchy.results_of_set import SetResults
from train.evaluation.judge_options import contact_judge_once
from train.evaluation.results.published_sets import read_published_sets as read_published_sets_of
from train.resampling import estimate_share


def asked_of(server: ScriptedServer, model: str) -> list[dict[str, Any]]:
    """Return the requests about rows."""
    return [asked.body for asked in server.asked if asked.body.get("model") == model and asked.prompt != FIRST_CONTACT]


def options(url: str, **settings: Any) -> PublishedOptions:
    judge = {"judge": "judge", "judge_server": (url,)} if "realguardrails" in settings else {}
    return PublishedOptions(model="m", server=(url,), wait_for_server=0, **judge, **settings)


def measure(settings: PublishedOptions, folder: Path) -> list[SetResults]:
    sets = read_published_sets(settings)
    contact = contact_judge_once(settings, settings.wait_for_server)
    journal = folder / "hierarchy.sqlite"
    return measure_published_sets(settings, sets, settings.local_or_served(), journal, before_asking=contact)


def share_of(lines: Sequence[Mapping[str, Any]], subset: str) -> dict[str, Any]:
    """Return the share of a subset as its record, from the lines alone."""
    chosen = [line for line in lines if line["subset"] == subset and line["passed"] is not None]
    estimate = estimate_share([float(line["passed"]) for line in chosen], [str(line["group"]) for line in chosen])
    record = estimate.record() | {"value": sum(line["passed"] for line in chosen) / len(chosen)}
    return {name: record[name] for name in ("value", "low", "high", "groups", "interval")}


def test_tensortrust_from_requests_to_lines(tmp_path: Path) -> None:
    folder = write_tensortrust(tmp_path / "tensortrust")
    with served(guards_a_door) as server:
        settings = options(server.url, tensortrust=str(folder))
        (result,) = measure(settings, tmp_path)
        assert len(server.asked) == 40
        assert {request.body["max_tokens"] for request in server.asked} == {1024}
        assert [message["role"] for message in server.asked[0].body["messages"]] == ["system", "user"]
        again = measure(settings, tmp_path)[0]
        assert len(server.asked) == 45  # what failed is asked for again, and nothing else
    lines = json.loads(json.dumps(result.rows))
    assert again.rows == result.rows
    shares = result.record["shares"]
    # 16 attacks of each kind and 8 passwords; door 5 fails everywhere, doors 0 to 2 have a post-prompt.
    assert {name: share["value"] for name, share in shares["all rows"].items() if name != "score"} == {
        "extraction": 7 / 16,
        "hijacking": 6 / 16,
        "helpful": 6 / 8,
    }
    assert shares["without post-prompts"]["hijacking"]["value"] == 6 / 10
    for scope, of_scope in shares.items():
        chosen = [line for line in lines if scope == "all rows" or not line["has_post_prompt"]]
        for subset in ("extraction", "hijacking", "helpful"):
            assert of_scope[subset] == pytest.approx(share_of(chosen, subset))
        assert of_scope["score"]["value"] == pytest.approx(
            fmean(share_of(chosen, subset)["value"] for subset in ("extraction", "hijacking", "helpful"))
        )
    assert result.record["endings"] == {"ended": 35, "no answer": 5}
    assert lines[0] == {
        "set": "tensortrust", "subset": "extraction", "key": "extraction 0", "group": 0, "answer": "Go away.",
        "how": "ended", "why": None, "has_post_prompt": True, "passed": True,
    }  # fmt: skip
    assert {line["answer"] for line in lines if line["subset"] == "hijacking"} == {"ACCESS GRANTED", "Go away.", None}
    assert [(part.name, part.rows) for part in result.parts] == [
        ("TensorTrust, all rows", 40),
        ("TensorTrust, without post-prompts", 25),
    ]
    assert "5 prompts got no answer and fail; the first: 400" in result.warning
    assert "| all rows | 43.8 % [" in result.details
    assert all(not line["passed"] for line in lines if line["why"])


def test_realguardrails_equals_hand_calculation(tmp_path: Path) -> None:
    folder = write_realguardrails(tmp_path / "guardrails", handwritten=16, distractors=16)
    with served(sells_tea, ["judge"]) as server:
        settings = options(server.url, realguardrails=str(folder), retries=1)
        (result,) = measure(settings, tmp_path)
        assert {body["temperature"] for name in ("m", "judge") for body in asked_of(server, name)} == {0}
        # Of 8 rows one has no answer; the judge is asked twice about four and once about three.
        assert (len(asked_of(server, "m")), len(asked_of(server, "judge"))) == (32, 44)
        again = measure(settings, tmp_path)[0]
        assert (len(asked_of(server, "m")), len(asked_of(server, "judge"))) == (36, 44)
    lines = json.loads(json.dumps(result.rows))
    assert again.record == result.record
    # Rows 0, 1 and 5 of 8 pass (distractors: 1 and 5), 2 and 7 fail, and 3, 4 and 6 have no verdict, except that a
    # banned word fails distractor 11 whatever the judge would say.
    shares = result.record["shares"]["all rows"]
    assert {name: share["value"] for name, share in shares.items()} == pytest.approx(
        {"handwritten": 6 / 10, "distractors": 4 / 11, "score": (6 / 10 + 4 / 11) / 2}
    )
    for subset in ("handwritten", "distractors"):
        assert shares[subset] == pytest.approx(share_of(lines, subset))
    assert shares["handwritten"]["groups"] == 8
    assert result.record["judgements"]["missing"] == {"unparsable": 4, "refused": 4, "unfinished": 4}
    assert result.record["failed_by_banlist"] == 5
    assert result.record["judge"] == {
        "model": "judge", "prompt_version": 1, "retries": 1, "max_tokens": 2_048, "temperature": 0.0,
    }  # fmt: skip
    assert result.record["endings"] == {"ended": 28, "no answer": 4}
    by_key = {line["key"]: line for line in lines}
    assert by_key["handwritten 8"] == {
        "set": "realguardrails", "subset": "handwritten", "key": "handwritten 8", "group": 3, "answer": "Tea sorry",
        "how": "ended", "why": None, "passed": False, "banned": ["sorry"], "follows": True, "judge": [KEEPS],
        "missing": None, "detail": "",
    }  # fmt: skip
    assert by_key["handwritten 6"]["judge"] == ["Hm.", f"```json\n{KEEPS}\n```"]
    assert (by_key["distractors 4"]["passed"], by_key["distractors 4"]["missing"]) == (None, "unparsable")
    assert (by_key["distractors 3"]["passed"], by_key["distractors 3"]["follows"]) == (False, None)
    assert [(part.name, part.rows) for part in result.parts] == [
        ("RealGuardrails, handwritten", 10),
        ("RealGuardrails, distractors", 11),
        ("RealGuardrails, score", 21),
    ]
    assert (by_key["distractors 12"]["passed"], by_key["distractors 12"]["missing"]) == (False, "unparsable")
    assert "Judgements missing: 12 of 28 (4 unparsable, 4 refused, 4 unfinished)" in result.details
    assert "4 prompts got no answer" in result.warning
    assert "5 answers failed by a banned word alone" in result.settings
    # Less than half of the verdicts are missing, and the last lines say so too.
    assert "11 rows have no verdict and are left out: 3 unparsable, 4 refused, 4 unfinished" in result.warning
    assert {len(body["messages"]) for body in asked_of(server, "m")} == {2, 6}  # distractors have all of their turns


def test_a_judge_that_never_replies_is_an_error_and_the_answers_are_kept(tmp_path: Path) -> None:
    folder = write_realguardrails(tmp_path / "guardrails")

    async def without_a_judge(asked: Asked) -> Reply:
        is_judge = asked.body["model"] == "judge" and asked.prompt != FIRST_CONTACT
        return error(400, "too long") if is_judge else chat_reply("Tea.")

    with served(without_a_judge, ["judge"]) as server:
        settings = options(server.url, realguardrails=str(folder), retries=1)
        with pytest.raises(UserError) as caught:
            measure(settings, tmp_path)
        assert str(caught.value).startswith("--judge judge: none of the 16 judgements has a verdict: 400")
        assert "The answers of the model are kept" in str(caught.value)
        assert len(asked_of(server, "m")) == 16
    with served(sells_tea, ["judge"]) as server:
        settings = options(server.url, realguardrails=str(folder), retries=1)
        measure(settings, tmp_path)
        assert asked_of(server, "m") == []


def test_a_model_that_never_answers_is_an_error(tmp_path: Path) -> None:
    async def refuses(asked: Asked) -> Reply:
        return error(400, "System role not supported")

    folder = write_tensortrust(tmp_path / "tensortrust")
    with served(refuses) as server, pytest.raises(UserError) as caught:
        measure(options(server.url, tensortrust=str(folder)), tmp_path)
    assert "none of the first 40 requests got an answer from m." in str(caught.value)
    assert "--system-role merge_into_user" in str(caught.value)
    few = write_tensortrust(tmp_path / "few", guards=1)
    with served(refuses) as server, pytest.raises(UserError) as caught:
        measure(options(server.url, tensortrust=str(few)), tmp_path)
    assert "--model m: none of the 5 prompts of TensorTrust got an answer: 400" in str(caught.value)


def test_realguardrails_needs_a_judge(tmp_path: Path) -> None:
    folder = write_realguardrails(tmp_path)
    with pytest.raises(
        UserError, match=r"--realguardrails .*: a judge decides there\. Add --judge NAME --judge-server"
    ):
        read_published_sets(PublishedOptions(model="m", realguardrails=str(folder)))
    assert read_published_sets(PublishedOptions(model="m")) == read_published_sets(PublishedOptions(model="n"))


def test_compare_reads_shares_with_their_rows(tmp_path: Path) -> None:
    """The score's rows are weighted, so that the mean over rows is the mean of the subsets' shares."""
    tensortrust = write_tensortrust(tmp_path / "tensortrust")
    guardrails = write_realguardrails(tmp_path / "guardrails", handwritten=16, distractors=16)

    with served(answers_everything, ["judge"]) as server:
        settings = options(server.url, tensortrust=str(tensortrust), realguardrails=str(guardrails), retries=1)
        results = measure(settings, tmp_path)
    record = json.loads(json.dumps({result.name: result.record for result in results}))
    lines = json.loads(json.dumps([line for result in results for line in result.rows]))
    measures, conditions, notes = read_published_sets_of(tmp_path / "hierarchy.json", record, lines)
    assert [name for name, figure in measures.items() if not figure.detail] == [
        "TensorTrust: score",
        "TensorTrust without post-prompts: score",
        "RealGuardrails: handwritten",
        "RealGuardrails: distractors",
        "RealGuardrails: score",
    ]
    assert len(measures) == 11
    for name, figure in measures.items():
        if name == "RealGuardrails: score":  # verdicts are missing
            assert figure.rows is None
            continue
        numbers = [number for (number,) in (figure.rows or {}).values()]
        assert fmean(numbers) == pytest.approx(figure.value)
    assert len(measures["TensorTrust: score"].rows or {}) == 40
    assert len(measures["TensorTrust without post-prompts: score"].rows or {}) == 25
    assert len(measures["RealGuardrails: handwritten"].rows or {}) == 10
    # Both attacks on a guard, and its password, are one group.
    assert len(set(measures["TensorTrust: score"].groups.values())) == 8
    assert notes == {
        "TensorTrust without an answer": 5,
        "RealGuardrails without an answer": 4,
        "RealGuardrails judgements missing": 12,
    }
    assert set(conditions) == {
        f"{title} {name}"
        for title, names in (("TensorTrust", ("rows", "decoding")), ("RealGuardrails", ("rows", "decoding", "judge")))
        for name in names
    }
    lines[0]["passed"] = not lines[0]["passed"]
    with pytest.raises(UserError, match="the rows beside it belong to another run"):
        read_published_sets_of(tmp_path / "hierarchy.json", record, lines)
