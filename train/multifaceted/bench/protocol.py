"""Scoring protocol of the bench: the settings of the paper (arXiv:2405.17977) and those of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.errors import UserError
from train.llm.request import Decoding
from train.reporting.conditions import UNKNOWN, recorded_differences

HUB_ID = "kaist-ai/Multifaceted-Bench"
ROWS_OF_THE_BENCH = 921

PAPERS_RESPONSES = Decoding(max_tokens=1024, temperature=1.0, top_p=0.9, extra={"repetition_penalty": 1.03})
"""The paper's sampling settings of the responses."""
PAPERS_JUDGE = "gpt-4-0125-preview"
PAPERS_DECODING = Decoding(max_tokens=1024, temperature=1.0, top_p=0.9)
"""Sampling settings of its judge."""
PAPERS_RUNS = 3

MAX_RUNS = 100
"""The judge's noise in a rubric's score falls with the square root of the runs: 100 runs leave a tenth of it. Each run
asks about every rubric of every row again."""
MAX_ANSWERS = 1_024
"""Limit of best of N: the judge grades all answers to a row before one is picked."""

GOOD = 4.0
"""Score from which a tie of two models counts as both good. The paper states no number; this one is ours."""

Picking = Literal["first run", "all runs", "file", "reward"]


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """The judge and its settings; the defaults are the paper's, except `retries`, which it does not mention."""

    model: str
    decoding: Decoding = PAPERS_DECODING
    runs: int = PAPERS_RUNS
    retries: int = 3
    show_system: bool = False


@dataclass(frozen=True, slots=True)
class Protocol:
    """Scoring of rows: the judge's settings, and the pick of one of several answers; `best_of` 1 picks nothing.

    `reward_model`: name of the model that picks by `reward`.
    """

    judge: JudgeSettings
    best_of: int = 1
    pick_by: Picking = "first run"
    reward_model: str | None = None

    @property
    def picked_by(self) -> str | None:
        """Return the pick as files record it; None if there is one answer."""
        if self.best_of == 1:
            return None
        return f"reward model {self.reward_model}" if self.pick_by == "reward" else self.pick_by

    @property
    def picks_by_given_scores(self) -> bool:
        """Return whether scores from elsewhere pick, so that the judge sees only the answer that is picked."""
        return self.best_of > 1 and self.pick_by in ("file", "reward")

    @property
    def picks_by_first_run(self) -> bool:
        """Return whether the judge's first run picks an answer and does not score it."""
        return self.best_of > 1 and self.pick_by == "first run"

    @property
    def scoring_runs(self) -> range:
        """Return the runs that a score is the mean of."""
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
    "picked by": "--pick-by, --reward-model",
    "decoding": "--max-tokens, --temperature, --top-p, --repetition-penalty",
}
"""Settings that must agree before scores are compared, each with the option that sets it.

`decoding` is that of the responses."""

NOTED = ("system_message_given", "system_role", "template", "engine", "dtype")
"""Settings of the model under evaluation. They may differ, as in the paper's ablation without system messages; the
difference becomes a note."""


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
    """Return the sampling fields of a request for JSON; None for a field that the paper sends and this one does not."""
    limit = decoding.max_tokens if decoding.limit_name else None
    return {"max_tokens": limit} | dict.fromkeys(papers.parameters(0)) | decoding.parameters(0)


def settings_of(protocol: Protocol, prompt_version: int, responses: Decoding | None) -> dict[str, Any]:
    """Return the value of each of OPTIONS for a run. `responses`: their sampling settings; None = read from a file."""
    return protocol_of(
        {
            "judge": judge_record(protocol.judge, prompt_version),
            "best_of": {"answers": protocol.best_of, "picked_by": protocol.picked_by},
            "decoding": decoding_record(responses, PAPERS_RESPONSES) if responses else None,
        }
    )


def protocol_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each of OPTIONS from a record of bench.json, or from a line of bench_rows.jsonl."""
    settings = record.get("protocol")
    if settings is None:
        judge = {"prompt_version": 1, **record["judge"]}  # not recorded before version 2
        if "max_tokens" in judge:
            judge = {"temperature": None, "top_p": None, **judge}
        keys = [name.removeprefix("judge ") for name in OPTIONS if name.startswith("judge ")]
        settings = {f"judge {key}": judge.pop(key) for key in keys if key in judge}
        if "judge max_tokens" in settings:
            settings["judge extra"] = judge
        best = record.get("best_of", {"answers": 1, "picked_by": None})
        settings |= {"best of": best["answers"], "picked by": best["picked_by"]}
        decoding = record.get("decoding") or {}
        settings["decoding"] = {name: value for name, value in decoding.items() if value is not None} or UNKNOWN
    settings = {"judge prompt_version": 1} | settings
    return {name: settings.get(name, UNKNOWN) for name in OPTIONS}


def noted_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each of NOTED from a record of bench.json, or from a line of bench_rows.jsonl."""
    settings = {**record, **(record.get("respondent") or {}), **record.get("protocol", {})}
    if settings.get("system_message_given") is None:
        return dict.fromkeys(NOTED, UNKNOWN)
    return {name: settings.get(name, UNKNOWN) for name in NOTED}


def refuse_other_protocol(
    first: str, settings_of_first: Mapping[str, Any], second: str, settings_of_second: Mapping[str, Any]
) -> None:
    """Raise UserError with each of OPTIONS that differs between two measurements, and with the command to run again."""
    unequal = recorded_differences(settings_of_first, settings_of_second)
    if not unequal:
        return
    names = [name for name in OPTIONS if any(text.startswith((f"{name} ", f"{name}: ")) for text in unequal)]
    options = ", ".join(OPTIONS[name] for name in names if OPTIONS[name])
    same = f" with the same {options}" if options else ""
    older = _older_side(first, settings_of_first, second, settings_of_second)
    raise UserError(
        f"{first} and {second}: the scores cannot be compared, as the settings differ: {'; '.join(unequal)}. "
        f"Run bench again for {older}{same}; unchanged answers are taken from the journal."
    )


def _older_side(
    first: str, settings_of_first: Mapping[str, Any], second: str, settings_of_second: Mapping[str, Any]
) -> str:
    """Return the side to measure again: the one with the older version of the judge's prompt, if they differ."""
    versions = settings_of_first["judge prompt_version"], settings_of_second["judge prompt_version"]
    if versions[0] == versions[1]:
        return "one of the two"
    older, version = (first, versions[0]) if versions[0] < versions[1] else (second, versions[1])
    model = f"the model of {older.removeprefix('--against ')}"
    return f"{model} (version {version} of the judge's prompt has been replaced)"
