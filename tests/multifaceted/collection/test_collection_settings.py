"""Effects of each key of a collection's configuration, and of invalid replies."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from collection_runs import good_everything, lines, mark_in, run_with, saying, stage_of, written
from scripted_author import FOUR, turns
from scripted_server import Asked, Reply, said

from train.data.sources.formats import RowError
from train.data.sources.source import read_conversations
from train.datagen.source_rows import SourcesSection
from train.errors import UserError
from train.llm.client import Client
from train.llm.concurrency import Backoff
from train.multifaceted.collection.config import FilterSection, load_config
from train.multifaceted.collection.hierarchy import load_hierarchy
from train.multifaceted.collection.instructions import iter_instructions
from train.recipe import Source

ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "recipes" / "collection").glob("*.yaml"))
BICYCLE = "What is the matter with the rusty bicycle chain?"


def reasons(folder: Path) -> list[tuple[int | None, str]]:
    return [(row["set"], row["reason"]) for row in lines(folder / "out" / "left_out.jsonl")]


def first_tries_fail(stage: str, reply: Reply | str, tries: int = 1) -> Any:
    """Return a reply that differs for the first tries of a stage."""
    begun: Counter[str] = Counter()

    def change(asked: Asked) -> Reply | str:
        begun[stage] += 1
        return reply if begun[stage] <= tries else good_everything(asked)

    return {stage: change}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_loads_and_its_command_names_it(path: Path) -> None:
    config = load_config(path)
    assert config.output_dir == f"outputs/collection/{path.stem}"
    assert f"scripts/collection.py --config recipes/collection/{path.name}" in path.read_text("utf-8")
    assert config.sets_per_instruction == 3


@pytest.mark.parametrize("sets", [1, 2])
def test_sets_per_instruction_sets_the_number_of_rows(tmp_path: Path, sets: int) -> None:
    done, asked = run_with(saying(), tmp_path, [turns(BICYCLE)], sets_per_instruction=sets)
    assert Counter(map(stage_of, asked)) == dict.fromkeys(("propose", "describe", "message", "answer"), sets)
    assert len(written(tmp_path)) == sets
    assert done.stats.pairs == (sets > 1)


def test_preferences_from_the_hierarchy_need_no_request_and_differ(tmp_path: Path) -> None:
    rows = [turns(f"{BICYCLE} {number}") for number in range(5)]
    _, asked = run_with(saying(), tmp_path, rows, preferences="hierarchy")
    assert Counter(map(stage_of, asked)) == dict.fromkeys(("describe", "message", "answer"), 15)
    ours = load_hierarchy()
    counts = Counter()
    for row in written(tmp_path):
        for preference in row["preference_set"]:
            assert preference["preference"] in ours[preference["dimension"]][preference["subdimension"]].preferences
            counts[preference["dimension"], preference["subdimension"]] += 1
    assert set(counts.values()) == {3}  # fifteen sets, five sub-dimensions


def test_the_message_is_written_from_the_descriptions_alone_and_the_answer_under_it(tmp_path: Path) -> None:
    _, asked = run_with(saying(), tmp_path, [turns(BICYCLE)], sets_per_instruction=1)
    (row,) = written(tmp_path)
    of = {stage_of(request): request.body["messages"] for request in asked}
    for stage in ("describe", "message"):
        assert not any(BICYCLE in turn["content"] for turn in of[stage])
    for turn in of["message"]:
        assert "dimension" not in turn["content"]
    for preference in row["preference_set"]:
        assert preference["preference"] in of["describe"][-1]["content"]
        assert preference["description"] in of["message"][-1]["content"]
        assert preference["preference"] not in of["message"][-1]["content"]
    assert of["answer"] == [{"role": "system", "content": row["system"]}, {"role": "user", "content": BICYCLE}]
    for stage in ("propose", "describe", "message"):  # some models have no system role
        assert {turn["role"] for turn in of[stage]} == {"user", "assistant"}


def test_a_siblings_preference_is_requested_again_with_preferences_to_avoid(tmp_path: Path) -> None:
    asked_again: list[str] = []

    def propose(asked: Asked) -> str:
        if "Do not propose" in asked.prompt:
            asked_again.append(asked.prompt)
            return good_everything(asked)
        return f"style: Dry WIT!\nbackground_knowledge: k{asked.number}\ninformativeness: i{asked.number}\nharmlessness: h{asked.number}"

    done, _ = run_with(saying(propose=propose), tmp_path, [turns(BICYCLE)])
    rows = written(tmp_path)
    styles = [row["preference_set"][0]["preference"] for row in rows]
    assert styles[0] == "Dry WIT!"
    assert len({style.casefold() for style in styles}) == 3
    assert len(asked_again) == 2
    for prompt in asked_again:
        wanted, _, avoid = prompt.rpartition("\n\n")
        assert [line[2:].partition(",")[0] for line in wanted.rpartition("### Aspects\n")[2].splitlines()] == ["style"]
        assert avoid.startswith("Do not propose any of these again: Dry WIT!")
    assert done.stats.events["preferences: the same as a sibling's, of some or all dimensions"] == 2


def test_a_sibling_that_never_differs_is_dropped(tmp_path: Path) -> None:
    reply = "style: A\nbackground_knowledge: B\ninformativeness: C\nharmlessness: D"
    run_with(saying(propose=reply), tmp_path, [turns(BICYCLE)])
    assert len(written(tmp_path)) == 1
    assert reasons(tmp_path) == [
        (1, "preferences: the same as a sibling's"),
        (2, "preferences: the same as a sibling's"),
    ]
    (tmp_path / "message").mkdir()
    run_with(saying(message="You are one."), tmp_path / "message", [turns(BICYCLE)])
    assert reasons(tmp_path / "message") == [(number, "system message: the same as a sibling's") for number in (1, 2)]


FAULTS: list[tuple[str, Reply | str, str]] = [
    ("propose", "style: " + "x" * 201, "preferences: too long"),
    ("propose", "style: tone\nstyle: Style\nnothing: here", "preferences: can't be read"),
    ("propose", said("style: Dry wit\nharmlessness: Cau", "length"), "preferences: cut at the token limit"),
    ("describe", "<think>on and on", "descriptions: without an end to its reasoning"),
    ("describe", "\n".join(f"{name}: It is short." for name in FOUR), "descriptions: the same for two dimensions"),
    ("describe", said("", refusal="No."), "descriptions: refused"),
    ("message", "I'm sorry, I can't help with that.", "system message: refused"),
    ("message", "As an AI, I cannot.", "system message: refused"),
    ("message", "```\n\n```", "system message: empty"),
    ("message", "Could you share the four descriptions?", "system message: can't be read"),
    ("message", said("You are a", "length"), "system message: cut at the token limit"),
    ("answer", "<think>hm", "answer: without an end to its reasoning"),
    ("answer", said("", "content_filter"), "answer: refused"),
    ("answer", said("On and", "length"), "answer: cut at the token limit"),
    ("answer", said("On and", "MAX_TOKENS"), "answer: cut at the token limit"),
    ("answer", said(None, "content_filter: SAFETY"), "answer: refused"),
    ("answer", said("On and", "foo"), "answer: ended for an unknown reason (foo)"),
    ("answer", said(None, tool_calls=[{"id": "1"}]), "answer: calls a tool"),
    ("message", said("You are a", "model_length"), "system message: cut at the token limit"),
    ("describe", said(None, "SPII"), "descriptions: refused"),
    ("answer", Reply(400, {"error": {"message": "too long a prompt"}}), "no answer from the model"),
]
"""Reply of a stage, and its event in the report. The instruction's mark tells which."""


@pytest.mark.parametrize(("tries", "retries"), [(1, 0), (2, 2), (3, 2)])
def test_sets_that_are_dropped_and_sets_that_a_retry_saves(tmp_path: Path, tries: int, retries: int) -> None:
    """Each error in this many tries of its stage, one instruction per error."""
    seen: Counter[tuple[int, str]] = Counter()

    async def script(asked: Asked) -> Reply:
        number, stage = int(mark_in(asked)[1:-1]), stage_of(asked)
        where, reply, _ = FAULTS[number]
        seen[number, stage] += 1
        if stage == where and seen[number, stage] <= tries:
            return said(reply) if isinstance(reply, str) else reply
        return said(good_everything(asked))

    rows = [turns(f"What is [{number}]?") for number in range(len(FAULTS))]
    run_with(script, tmp_path, rows, sets_per_instruction=1, retries=retries)
    left = {row["prompt"]: row["reason"] for row in lines(tmp_path / "out" / "left_out.jsonl")}
    for number, (stage, _, why) in enumerate(FAULTS):
        hopeless = why == "no answer from the model"
        lost = tries > retries or hopeless
        assert left.get(f"What is [{number}]?") == (why if lost else None)
        assert seen[number, stage] == (1 if hopeless else tries + (not lost))


def test_control_tokens_and_reasoning_of_servers_are_in_no_row(tmp_path: Path) -> None:
    def leaky(asked: Asked) -> str:
        analysis = "<|channel|>analysis<|message|>style: Hm.<|end|><|start|>assistant<|channel|>final<|message|>"
        return f"{analysis}{good_everything(asked)}<|return|>"

    stages = ("propose", "describe", "message", "answer")
    done, _ = run_with(saying(**dict.fromkeys(stages, leaky)), tmp_path, [turns(BICYCLE)], sets_per_instruction=1)
    (tmp_path / "plain").mkdir()
    run_with(saying(), tmp_path / "plain", [turns(BICYCLE)], sets_per_instruction=1)
    for column in ("preference_set", "system", "output"):
        assert [row[column] for row in written(tmp_path)] == [row[column] for row in written(tmp_path / "plain")]
    assert all(done.stats.events[f"{stage}: reasoning taken out"] == 1 for stage in stages)


def test_a_cut_answer_may_be_kept(tmp_path: Path) -> None:
    cut = said("On and", "length")
    done, asked = run_with(saying(answer=lambda _: cut), tmp_path, [turns(BICYCLE)], on_cut_answer="keep")
    assert [row["output"] for row in written(tmp_path)] == ["On and"] * 3
    assert Counter(map(stage_of, asked))["answer"] == 3
    assert done.stats.events["answer: cut at the token limit, and kept"] == 3
    assert done.stats.pairs == 0  # they say the same


@pytest.mark.parametrize(("leak", "kept"), [(0.75, 0), (0.8, 3), (None, 3)])
def test_a_message_that_leaks_the_instruction_is_generated_again(tmp_path: Path, leak: float | None, kept: int) -> None:
    """It has three of matter, rusty, bicycle and chain."""

    def message(asked: Asked) -> str:
        return f"You are {asked.number}, and mend a Rusty bicycle chain: bicycle after bicycle."

    run_with(saying(message=message), tmp_path, [turns(BICYCLE)], leak=leak, retries=0)
    assert len(written(tmp_path)) == kept


@pytest.mark.parametrize(("choice", "kept"), [("keep", 2), ("drop_instruction", 0)])
def test_an_instruction_with_a_dropped_set_follows_on_lost_set(tmp_path: Path, choice: str, kept: int) -> None:
    lost = first_tries_fail("answer", said("", refusal="No."), tries=2)
    rows = [turns(BICYCLE)]
    _, asked = run_with(saying(**lost), tmp_path, rows, on_lost_set=choice, retries=1)
    assert len(written(tmp_path)) == kept
    wanted = [(0, "answer: refused")]
    if choice == "drop_instruction":
        wanted += [(number, "another set of the instruction was lost") for number in (1, 2)]
        assert Counter(map(stage_of, asked))["propose"] == 1  # nothing is asked for what is not written
    assert reasons(tmp_path) == wanted


@pytest.mark.parametrize(("pairs", "count"), [("one", 1), ("all", 6), ("none", 0)])
def test_number_of_pairs(tmp_path: Path, pairs: str, count: int) -> None:
    run_with(saying(), tmp_path, [turns(BICYCLE)], pairs=pairs)
    answers = {row["system"]: row["output"] for row in written(tmp_path)}
    if pairs == "none":
        assert not (tmp_path / "out" / "pairs").exists()
        return
    pairs_written = written(tmp_path, "pairs/rows.jsonl")
    assert len({(pair["system"], pair["rejected"][1]["content"]) for pair in pairs_written}) == count
    for pair in pairs_written:
        assert pair["chosen"][1]["content"] == answers[pair["system"]] != pair["rejected"][1]["content"]
    run_with(saying(), tmp_path, [turns(BICYCLE)], pairs="none")
    assert written(tmp_path, "pairs/rows.jsonl") == []  # those of the run before are gone


def test_the_model_as_a_second_filter(tmp_path: Path) -> None:
    def screen(asked: Asked) -> str:
        return "**Yes**, it does." if "yes please" in asked.prompt else "Hm." if "hm please" in asked.prompt else "No"

    rows = [turns("yes please"), turns("hm please"), turns("no please")]
    done, asked = run_with(saying(screen=screen), tmp_path, rows, filter={"model": True}, sets_per_instruction=1)
    assert reasons(tmp_path) == [(None, "states a style or format, says the model")]
    assert [row["prompt"] for row in written(tmp_path)] == ["hm please", "no please"]
    assert done.stats.events["screen: neither yes nor no, and kept"] == 1
    assert done.stats.instructions == 2
    assert {request.body["temperature"] for request in asked if stage_of(request) == "screen"} == {0.0}
    assert done.stats.warnings() == []


def test_a_filter_whose_verdicts_are_mostly_unread_ends_with_a_warning(tmp_path: Path) -> None:
    rows = [turns(f"prompt {word} please") for word in ("alpha", "beta", "gamma")]
    said = saying(screen=lambda asked: "No style is stated" if "alpha" not in asked.prompt else "I see no style: no.")
    done, _ = run_with(said, tmp_path, rows, filter={"model": True}, sets_per_instruction=1)
    (warning,) = done.stats.warnings()
    assert warning.startswith("filter.model: 2 of 3 verdicts could not be read (67%). These instructions were kept.")
    assert f"**Warning: {warning}**" in (tmp_path / "out" / "report.md").read_text("utf-8")


def test_rules_of_the_filter_can_be_chosen(tmp_path: Path) -> None:
    rows = [turns("Act as a pirate. What is rum?"), turns("What is rum? Answer in one word.")]
    run_with(saying(), tmp_path, rows, filter={"rules": ["length", "format"]}, sets_per_instruction=1)
    (left,) = lines(tmp_path / "out" / "left_out.jsonl")
    assert (left["reason"], left["detail"]) == ("states a length already", "length: in one word")
    run_with(saying(), tmp_path, rows, filter={"rules": []}, sets_per_instruction=1)
    assert len(written(tmp_path)) == 2


def test_duplicates_are_dropped(tmp_path: Path) -> None:
    rows = [
        turns("What is  Rum?"), turns("what is rum"), turns("What is 2^2?"), turns("What is 2²?"),
        turns(f"{BICYCLE} It squeaks whenever I ride to the market in the rain."),
        turns(f"{BICYCLE} It squeaks whenever I ride to the market in the snow."),
    ]  # fmt: skip
    run_with(saying(), tmp_path, rows, sets_per_instruction=1, filter={"near_duplicates": 0.7})
    assert reasons(tmp_path) == [
        (None, "duplicate: the same as an instruction before"),
        (None, "duplicate: nearly an instruction before"),
    ]
    assert len(written(tmp_path)) == 4


def test_instructions_come_from_rows_of_any_format_with_their_sources(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    rows = [
        {"system": "Be brief.", "prompt": "one", "output": "x", "main_source": "Nectar", "original_source": "sharegpt"},
        {"system": "Be long.", "prompt": "one", "output": "y", "main_source": "Nectar", "original_source": "sharegpt"},
        {"prompt": "two", "output": "x", "source": "FLASK"},
        {"prompt": "three", "output": "x", "tools": [call]},
    ]
    done, _ = run_with(saying(), tmp_path, rows, sets_per_instruction=1)
    assert [(row["main_source"], row["original_source"], row["prompt"]) for row in written(tmp_path)] == [
        ("Nectar", "sharegpt", "one"), (str(tmp_path / "source.jsonl"), "FLASK", "two")
    ]  # fmt: skip
    assert reasons(tmp_path) == [
        (None, "duplicate: the same as an instruction before"),
        (None, "not supported: needs tools"),
    ]
    assert done.stats.events["row with a system message, which was ignored"] == 2


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Why is the sky blue?"},
        {"prompt": "Why is the sky blue?", "completion": None},
        {"user_prompt": "Why is the sky blue?", "id": 3},
        {"instruction": "Why is the", "input": "sky blue?"},
        {"question": "Why is the sky blue?"},
        {"query": "Why is the sky blue?"},
        {"messages": [{"role": "user", "content": "Why is the sky blue?"}]},
        {"messages": [{"from": "human", "value": "Why is the sky blue?"}]},
        {"conversations": [{"from": "human", "value": "Why is the sky blue?"}]},
        {"prompt": "Why is the sky blue?", "output": "It scatters."},
        {"prompt": [{"role": "user", "content": "Why is the sky blue?"}]},
    ],
    ids=str,
)
def test_an_instruction_needs_no_answer(tmp_path: Path, row: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    data = SourcesSection(sources=[{"path": str(path)}])
    [instruction] = iter_instructions(data, FilterSection(), None)
    assert (" ".join(instruction.prompt.split()), instruction.number, instruction.reason) == (
        "Why is the sky blue?",
        0,
        None,
    )


SKY = "Why is the sky blue?"
ASKED = {"role": "user", "content": SKY}
EMPTY_ANSWERS: dict[str, tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]] = {
    "messages": (
        {"messages": [ASKED, {"role": "assistant", "content": "x"}]},
        lambda answer: {"messages": [ASKED, {"role": "assistant", "content": answer}]},
    ),
    "messages as JSON": (
        {"messages": json.dumps([ASKED, {"role": "assistant", "content": "x"}])},
        lambda answer: {"messages": json.dumps([ASKED, {"role": "assistant", "content": answer}])},
    ),
    "no answer in JSON": (
        {"messages": json.dumps([ASKED, {"role": "assistant", "content": "x"}])},
        lambda answer: {"messages": json.dumps([ASKED])},
    ),
    "an empty answer in the middle": (
        {"messages": [ASKED, {"role": "assistant", "content": "x"}]},
        lambda answer: {
            "messages": [ASKED, {"role": "assistant", "content": answer}, {"role": "user", "content": "?"}]
        },
    ),
    "parts": (
        {"messages": [ASKED, {"role": "assistant", "content": "x"}]},
        lambda answer: {"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]},
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": SKY}, {"from": "gpt", "value": "x"}]},
        lambda answer: {"conversations": [{"from": "human", "value": SKY}, {"from": "gpt", "value": answer}]},
    ),
    "prompt_completion": ({"prompt": SKY, "completion": "x"}, lambda answer: {"prompt": SKY, "completion": answer}),
    "prompt_completion of turns": (
        {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "x"}]},
        lambda answer: {"prompt": [ASKED], "completion": [{"role": "assistant", "content": answer}]},
    ),
    "prompt_completion of no turn": (
        {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "x"}]},
        lambda answer: {"prompt": [ASKED], "completion": []},
    ),
    "janus": ({"system": "s", "prompt": SKY, "output": "x"}, lambda answer: {"prompt": SKY, "output": answer}),
    "alpaca": (
        {"instruction": "Why", "input": "is the sky blue?", "output": "x"},
        lambda answer: {"instruction": "Why", "input": "is the sky blue?", "output": answer},
    ),
    "alpaca with a history": (
        {"instruction": SKY, "history": [], "output": "x"},
        lambda answer: {"instruction": "And why?", "history": [[SKY, answer]], "output": answer},
    ),
    "question_answer": ({"question": SKY, "answer": "x"}, lambda answer: {"question": SKY, "answer": answer}),
    "question_answer, a response": (
        {"instruction": SKY, "response": "x"},
        lambda answer: {"instruction": SKY, "response": answer},
    ),
    "exchanges": (
        {"conversation": [{"input": SKY, "output": "x"}]},
        lambda answer: {"conversation": [{"input": SKY, "output": answer}]},
    ),
}


@pytest.mark.parametrize("answer", ["", " \n\t", None], ids=repr)
@pytest.mark.parametrize("first", ["whole", "empty"])
@pytest.mark.parametrize("form", EMPTY_ANSWERS)
def test_an_empty_or_blank_answer_is_treated_as_missing(tmp_path: Path, form: str, first: str, answer: Any) -> None:
    """In every format, whether or not the first row, which determines the format, has an answer."""
    whole, make_empty = EMPTY_ANSWERS[form]
    empty = make_empty(answer)
    rows = [whole, empty] if first == "whole" else [empty, empty]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = SourcesSection(sources=[{"path": str(path)}])
    instructions = list(iter_instructions(data, FilterSection(), None))
    assert [" ".join(instruction.prompt.split()) for instruction in instructions] == [SKY, SKY]
    assert [instruction.reason for instruction in instructions] == [
        None,
        "duplicate: the same as an instruction before",
    ]
    # The trainer, which needs answers, goes on refusing the same rows (a history and a middle turn too).
    read = [row for _, row in read_conversations(Source(path=str(path)))] if answer is not None else []
    assert all(isinstance(row, RowError) for row in read[first == "whole" :])


def test_rows_without_an_instruction_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns_of = [[{"role": "user", "content": " "}], [{"role": "assistant", "content": ""}], []]
    path.write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in turns_of), encoding="utf-8")
    instructions = iter_instructions(SourcesSection(sources=[{"path": str(path)}]), FilterSection(), None)
    assert [instruction.reason for instruction in instructions] == [
        "can't be read: empty content",
        "not supported: no user turn at the start",
        "not supported: no user turn at the start",
    ]


@pytest.mark.parametrize("column", ["prompt", "instruction", "question"])
def test_a_first_row_without_an_instruction_is_dropped_and_the_others_are_read(tmp_path: Path, column: str) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{column: None}, {column: "Why is the sky blue?"}, {column: None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    instructions = list(iter_instructions(SourcesSection(sources=[{"path": str(path)}]), FilterSection(), None))
    assert [instruction.number for instruction in instructions] == [None, 0, None]
    assert all((instruction.reason or "").startswith("can't be read: ") for instruction in instructions[::2])


def test_a_missing_hierarchy_file_is_called_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hierarchy.file: .*mine.yaml: there is no such file"):
        load_hierarchy(tmp_path / "mine.yaml")


def test_a_user_hierarchy_replaces_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "".join(f"{name}:\n  only:\n    meaning: all\n    preferences: [A {name}, B {name}]\n" for name in FOUR)
    )
    settings = {"hierarchy": {"file": str(mine), "ours": False}, "preferences": "hierarchy"}
    _, asked = run_with(saying(), tmp_path, [turns(BICYCLE)], sets_per_instruction=2, **settings)
    preferences = [[preference["preference"] for preference in row["preference_set"]] for row in written(tmp_path)]
    assert [sorted(pair) for pair in zip(*preferences, strict=True)] == [[f"A {name}", f"B {name}"] for name in FOUR]
    described = next(request.body["messages"] for request in asked if stage_of(request) == "describe")
    assert len(described) == 1  # without descriptions there is no example
    with pytest.raises(UserError, match=r"3 sets of an instruction take 3 different preferences of style.only"):
        run_with(saying(), tmp_path, [turns(BICYCLE)], **settings)


def test_a_run_that_would_overwrite_its_source_is_an_error(tmp_path: Path) -> None:
    run_with(saying(), tmp_path, [turns(BICYCLE)])
    before = (tmp_path / "out" / "data" / "rows.jsonl").read_bytes()
    source = {"sources": [{"path": str(tmp_path / "out" / "data")}]}
    with pytest.raises(UserError, match="is in the output_dir of this run"):
        run_with(saying(), tmp_path, [turns(BICYCLE)], data=source)
    assert (tmp_path / "out" / "data" / "rows.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"rows.jsonl is of an earlier run with another output.format"):
        run_with(saying(), tmp_path, [turns(BICYCLE)], output={"format": "parquet"})


def test_a_changed_setting_repeats_only_dependent_requests(tmp_path: Path) -> None:
    rows = [turns(f"{BICYCLE} {number}") for number in range(4)]

    def plain(asked: Asked) -> str:
        """The same whenever it is asked."""
        return good_everything(Asked(asked.body, {}, "", len(asked.prompt), 0))

    script = saying(**dict.fromkeys(("propose", "describe"), plain), message=lambda asked: f"You are {hash(asked.prompt)}.", answer=lambda asked: f"So {hash(str(asked.body['messages']))}.")  # fmt: skip
    run_with(script, tmp_path, rows, preferences="hierarchy")
    _, asked = run_with(script, tmp_path, rows, preferences="hierarchy", pairs="all", leak=None)
    assert asked == []
    _, asked = run_with(script, tmp_path, rows, preferences="hierarchy", answer={"max_tokens": 64, "temperature": 0.1})
    assert Counter(map(stage_of, asked)) == {"answer": 12}


@pytest.mark.parametrize("stage", ["propose", "describe", "message"])
def test_an_empty_answer_followed_by_a_retry_changes_no_later_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """The second set of the instruction gets an empty answer, and its retry names other preferences to avoid."""
    impatient = functools.partial(Client, attempts=2, backoff=Backoff(initial=0.001, longest=0.002))
    monkeypatch.setattr("train.datagen.run.Client", impatient)
    seen: Counter[str] = Counter()

    async def empty_once(asked: Asked) -> Reply:
        seen[stage_of(asked)] += 1
        return said("" if stage_of(asked) == stage and seen[stage] in (2, 3) else good_everything(asked))

    async def otherwise(asked: Asked) -> Reply:
        return said(good_everything(asked).replace("Kind", "Sort").replace("helper", "aide"))

    rows = [turns("What is [0]?")]
    run_with(empty_once, tmp_path, rows, sets_per_instruction=2)
    before = (tmp_path / "out" / "data" / "rows.jsonl").read_bytes()
    assert before.count(b"\n") == 2
    _, asked = run_with(otherwise, tmp_path, rows, sets_per_instruction=2)
    assert asked == []
    assert (tmp_path / "out" / "data" / "rows.jsonl").read_bytes() == before
