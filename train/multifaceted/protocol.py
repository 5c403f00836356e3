"""How the bench is scored: the paper's settings (arXiv:2405.17977) and those of a run. It imports nothing heavy."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.conditions import UNKNOWN, differences
from train.errors import UserError
from train.llm.journal import Decoding

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
    "judge sees the system message": "--show-system",
    "judge prompt version": "",
    "judge runs": "--runs",
    "judge retries": "--retries",
    "judge max_tokens": "--judge-max-tokens",
    "judge temperature": "--judge-temperature",
    "judge top_p": "--judge-top-p",
    "judge extra": "--judge-extra",
    "best of": "--best-of",
    "picked by": "--pick-by",
    "decoding": "--max-tokens, --temperature, --top-p, --repetition-penalty",
}
"""Settings that must agree before scores are compared, each with the option of the bench that sets it.

`decoding` is that of the responses. A system message that was left out (--no-system) is the paper's ablation: compared,
and noted.
"""


def settings_of(protocol: Protocol, prompt_version: int, responses: Decoding | None) -> dict[str, Any]:
    """Return the value of each of OPTIONS, for bench.json and the lines of bench_rows.jsonl.

    `responses`: how they were drawn; None where that is not known.
    """
    judge, decoding = protocol.judge, protocol.judge.decoding
    extra = decoding.parameters(0)
    return {
        "judge model": judge.model,
        "judge sees the system message": judge.show_system,
        "judge prompt version": prompt_version,
        "judge runs": judge.runs,
        "judge retries": judge.retries,
        "judge max_tokens": decoding.max_tokens,
        "judge temperature": extra.pop("temperature", None),
        "judge top_p": extra.pop("top_p", None),
        "judge extra": extra,
        "best of": protocol.best_of,
        "picked by": protocol.pick_by if protocol.best_of > 1 else None,
        "decoding": UNKNOWN if responses is None else decoding_record(responses),
    }


def decoding_record(decoding: Decoding) -> dict[str, Any]:
    """Return how answers are drawn, for JSON: what is sent."""
    limit = {"max_tokens": decoding.max_tokens} if decoding.limit_name else {}
    return limit | decoding.parameters(0)


def protocol_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the value of each of OPTIONS from a record of bench.json; UNKNOWN where it has none.

    Before bench.json had them all under `protocol`, most stood in its sections; the judge's prompt was version 1.
    """
    known = record.get("protocol")
    if known is None:
        judge = dict(record.get("judge", {}))
        known = {"judge sees the system message": judge.pop("sees_the_system_message", UNKNOWN)}
        names = ("model", "runs", "retries", "max_tokens", "temperature", "top_p")
        known |= {f"judge {name}": judge.pop(name) for name in names if name in judge}
        if "judge max_tokens" in known:
            known["judge extra"] = judge
        best = record.get("best_of", {"answers": 1, "picked_by": None})
        known |= {"best of": best["answers"], "picked by": best["picked_by"]}
        drawn = record.get("decoding") or {}
        known["decoding"] = {name: value for name, value in drawn.items() if value is not None} or UNKNOWN
    known = {"judge prompt version": 1} | known
    return {name: known.get(name, UNKNOWN) for name in OPTIONS}


def refuse_other_protocol(first: str, one: Mapping[str, Any], second: str, other: Mapping[str, Any]) -> None:
    """Raise UserError with each of OPTIONS that differs between two measurements, and with what to run again."""
    found = differences(one, other)
    if not found:
        return
    named = [name for name in OPTIONS if any(text.startswith(f"{name} ") for text in found)]
    options = ", ".join(OPTIONS[name] for name in named if OPTIONS[name])
    same = f" with the same {options}" if options else ""
    raise UserError(
        f"{first} and {second}: their scores can't be compared, as they were not measured alike: {'; '.join(found)}. "
        f"Run bench again for one of the two{same}: answers that this leaves as they are come from the journal."
    )
