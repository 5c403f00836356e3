"""How the bench is scored: the paper's settings (arXiv:2405.17977) and those of a run. It imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.errors import UserError
from train.llm.request import Decoding
from train.reporting.conditions import UNKNOWN, recorded_differences

HUB_ID = "kaist-ai/Multifaceted-Bench"
ROWS_OF_THE_BENCH = 921

PAPERS_RESPONSES = Decoding(max_tokens=1024, temperature=1.0, top_p=0.9, extra={"repetition_penalty": 1.03})
"""How the paper draws the answers."""
PAPERS_JUDGE = "gpt-4-0125-preview"
PAPERS_DECODING = Decoding(max_tokens=1024, temperature=1.0, top_p=0.9)
"""How its judge answers."""
PAPERS_RUNS = 3

MOST_RUNS = 100
"""The judge's own luck is in a rubric's score by one over the root of the runs: 100 leave a tenth of it. Each of them
asks about every rubric of every row again."""
MOST_ANSWERS = 1_024
"""To best of N: the judge grades all answers to a row before one is picked."""

GOOD = 4.0
"""From which score on a tie of two models is both good. The facts at hand give no number, so this one is ours."""

Picking = Literal["first run", "all runs", "file"]


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """Who judges and how; the defaults are the paper's, `retries` aside, of which it says nothing."""

    model: str
    decoding: Decoding = PAPERS_DECODING
    runs: int = PAPERS_RUNS
    retries: int = 3
    show_system: bool = False


@dataclass(frozen=True, slots=True)
class Protocol:
    """How rows are scored: the judge's settings, and which of several answers counts; `best_of` 1 picks nothing."""

    judge: JudgeSettings
    best_of: int = 1
    pick_by: Picking = "first run"

    @property
    def picks_by_first_run(self) -> bool:
        """Whether a run of the judge is there to pick, and not to score."""
        return self.best_of > 1 and self.pick_by == "first run"

    @property
    def scoring_runs(self) -> range:
        """The runs that a score is the mean of."""
        return range(1 if self.picks_by_first_run else 0, self.judge.runs)


OPTIONS = {
    "judge model": "--judge",
    "judge sees_the_system_message": "--show-system",
    "judge prompt_version": "",
    "judge runs": "--runs",
    "judge retries": "--retries",
    "judge max_tokens": "--judge-max-tokens (or max_completion_tokens in --judge-extra)",
    "judge temperature": "--judge-temperature",
    "judge top_p": "--judge-top-p",
    "judge extra": "--judge-extra",
    "best of": "--best-of",
    "picked by": "--pick-by",
    "decoding": "--max-tokens, --temperature, --top-p, --repetition-penalty",
}
"""Settings that must agree before scores are compared, each with the option of the bench that sets it.

`decoding` is that of the responses."""

NOTED = ("system_message_given", "system_role", "template", "engine", "dtype")
"""Settings of the model that responds. They may differ, as in the paper's ablation without system messages, and the
difference is named."""


def judge_record(settings: JudgeSettings, prompt_version: int) -> dict[str, Any]:
    """Return the section `judge` of bench.json."""
    return {
        "model": settings.model,
        "prompt_version": prompt_version,
        "sees_the_system_message": settings.show_system,
        "runs": settings.runs,
        "retries": settings.retries,
        **decoding_record(settings.decoding, PAPERS_DECODING),
    }


def decoding_record(decoding: Decoding, papers: Decoding) -> dict[str, Any]:
    """Return what a request holds of how answers are drawn, for JSON; None for what the paper's has and it has not."""
    limit = decoding.max_tokens if decoding.limit_name else None
    return {"max_tokens": limit} | dict.fromkeys(papers.parameters(0)) | decoding.parameters(0)


def settings_of(protocol: Protocol, prompt_version: int, responses: Decoding | None) -> dict[str, Any]:
    """Return the value of each of OPTIONS for a run. `responses`: how they are drawn; None where they are given."""
    picks = protocol.best_of > 1
    return protocol_of(
        {
            "judge": judge_record(protocol.judge, prompt_version),
            "best_of": {"answers": protocol.best_of, "picked_by": protocol.pick_by if picks else None},
            "decoding": decoding_record(responses, PAPERS_RESPONSES) if responses else None,
        }
    )


def protocol_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each of OPTIONS from a record of bench.json, or from a line of bench_rows.jsonl."""
    known = record.get("protocol")
    if known is None:
        judge = {"prompt_version": 1, **record["judge"]}  # which was not recorded before version 2
        if "max_tokens" in judge:
            judge = {"temperature": None, "top_p": None, **judge}
        keys = [name.removeprefix("judge ") for name in OPTIONS if name.startswith("judge ")]
        known = {f"judge {key}": judge.pop(key) for key in keys if key in judge}
        if "judge max_tokens" in known:
            known["judge extra"] = judge
        best = record.get("best_of", {"answers": 1, "picked_by": None})
        known |= {"best of": best["answers"], "picked by": best["picked_by"]}
        drawn = record.get("decoding") or {}
        known["decoding"] = {name: value for name, value in drawn.items() if value is not None} or UNKNOWN
    known = {"judge prompt_version": 1} | known
    return {name: known.get(name, UNKNOWN) for name in OPTIONS}


def noted_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each of NOTED from a record of bench.json, or from a line of bench_rows.jsonl."""
    known = {**record, **(record.get("respondent") or {}), **record.get("protocol", {})}
    return {name: UNKNOWN if known.get("system_message_given") is None else known.get(name, UNKNOWN) for name in NOTED}


def refuse_other_protocol(first: str, one: Mapping[str, Any], second: str, other: Mapping[str, Any]) -> None:
    """Raise UserError with each of OPTIONS that differs between two measurements, and with what to run again."""
    found = recorded_differences(one, other)
    if not found:
        return
    named = [name for name in OPTIONS if any(text.startswith(f"{name} ") for text in found)]
    options = ", ".join(OPTIONS[name] for name in named if OPTIONS[name])
    same = f" with the same {options}" if options else ""
    raise UserError(
        f"{first} and {second}: their scores can't be compared, as they were not measured alike: {'; '.join(found)}. "
        f"Run bench again for {_to_measure_again(first, one, second, other)}{same}; unchanged answers are taken from "
        "the journal."
    )


def _to_measure_again(first: str, one: Mapping[str, Any], second: str, other: Mapping[str, Any]) -> str:
    """Return the side to measure again: the one with the older version of the judge's prompt, if they differ."""
    versions = one["judge prompt_version"], other["judge prompt_version"]
    if versions[0] == versions[1]:
        return "one of the two"
    older, version = (first, versions[0]) if versions[0] < versions[1] else (second, versions[1])
    model = f"the model of {older.removeprefix('--against ')}"
    return f"{model} (version {version} of the judge's prompt can no longer be asked)"
