"""System gain: how much a model listens to the system message, without a judge and without generating anything.

For a row of instruction x, system message s and reference answer y, and other messages s'_1 .. s'_K (see
`train.system_gain.variants`), with L(y | s, x) = the sum of ln p over the trained tokens of y, under the template and
policy that the model is trained with:

    gain                = mean over k of  (L(y | s, x) - L(y | s'_k, x)) / tokens of y       nats per token
    preference accuracy = mean over k of  [L(y | s, x) > L(y | s'_k, x)], a tie counting half

and the same over no system message at all: what the model is given where a row has none, which under some templates is
a default of their own. Figures are means over rows; each has a 95 % interval and the p of a test against no effect
(gain 0, accuracy one half), both over instructions (`train.resampling`). The many groups are tested one by one: of
twenty without an effect one has p < 0.05.

y's tokens are the same under each message but where a template joins them to what stands before; then sums are still
compared and the tokens under its own message divide, and `other_tokens` says how many rows there were.

What it can't see:
- It scores the reference answer, not what the model would write. A model can find the right answer likelier and still
  write another; the gain is a necessary sign, not an obeyed message (`scripts/evaluate.py rules` counts those).
- Words that s and y share give a gain (a message that says "Ahoy" makes "Ahoy" likely), style as much as substance.
- It is a mean over tokens, and mostly the first ones of an answer tell which message it follows: a long answer has a
  small gain, one of a word or two a large one, and each counts as one row. Compare gains over the same rows only; the
  accuracy doesn't depend on length in this way.
- Two messages that ask for the same thing have no gain over one another, whatever the model does.
- Over no message, any text that fits the domain helps, and many models have seldom seen none: the gain over others is
  the stricter one. With siblings it is fair to both: each answer is scored under each message. Other rows' messages may
  differ from s in subject too, which makes the gain larger: the two kinds shouldn't be compared.

In bfloat16 a row's gain is off by some hundredths of a nat per token (root mean square 0.026 on 30 held-out rows of the
quickstart, against float32), which mostly cancels in the mean (0.003 there).
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from train.data.loss_mask import EncodedRow
from train.errors import UserError
from train.formatting import format_count
from train.resampling import (
    DIFFERENCE_BOUNDS,
    PERMUTATIONS,
    RESAMPLES,
    SHARE_BOUNDS,
    Bounds,
    Estimate,
    estimate_means,
    explain_missing_intervals,
)
from train.system_gain.log_likelihood import log_likelihoods
from train.system_gain.variants import Label, Variants

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURES = ("gain", "accuracy", "gain_over_none", "accuracy_over_none")
_NO_EFFECT = np.array([0.0, 0.5, 0.0, 0.5])
_OF_CHANGE = np.zeros(4)
_BOUNDS: tuple[Bounds, ...] = (None, SHARE_BOUNDS, None, SHARE_BOUNDS)
_BOUNDS_OF_CHANGE: tuple[Bounds, ...] = (None, DIFFERENCE_BOUNDS, None, DIFFERENCE_BOUNDS)


class Scores(Protocol):
    """Sums of log-probabilities that were computed before, and where further ones are kept."""

    def find(self, row: EncodedRow) -> float | None:
        """The sum of a row, if it was computed."""

    def add(self, rows: Sequence[EncodedRow], scores: Sequence[float]) -> None:
        """Keep those of further rows."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The four measures over some rows."""

    rows: int
    instructions: int
    gain: Estimate
    accuracy: Estimate
    gain_over_none: Estimate
    accuracy_over_none: Estimate

    def record(self) -> dict[str, Any]:
        """For JSON."""
        measures = {name: getattr(self, name).record() for name in MEASURES}
        return {"rows": self.rows, "instructions": self.instructions, **measures}


@dataclass(frozen=True, eq=False)
class SystemGain:
    """What was measured.

    `values`: the four `MEASURES` of each row [rows, 4]. `groups`: of each label that some, not all, rows have.
    """

    overall: Figures
    groups: Mapping[Label, Figures]
    values: NDArray[np.float64]
    instructions: NDArray[np.int64]
    labels: Sequence[tuple[Label, ...]]
    with_siblings: int
    other_tokens: int

    def metrics(self, prefix: str = "eval_") -> dict[str, float]:
        """The overall figures flat, as a trainer logs them."""
        found: dict[str, float] = {}
        for measure in MEASURES:
            estimate: Estimate = getattr(self.overall, measure)
            name = f"{prefix}system_{measure}"
            bounds = {"_low": estimate.low, "_high": estimate.high, "_p": estimate.p}
            found |= {name: estimate.mean, **{name + end: value for end, value in bounds.items() if value is not None}}
        return found

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "overall": self.overall.record(),
            "groups": [{"of": of, "is": value, **figures.record()} for (of, value), figures in self.groups.items()],
            "rows_with_siblings": self.with_siblings,
            "rows_with_other_tokens": self.other_tokens,
        }

    def change_from(self, before: "SystemGain", *, seed: int = 0) -> dict[Label | None, Figures]:
        """Of each row this minus `before`, which measured the same rows: overall (None) and of each group.

        Pairs of rows leave much less to chance than two intervals that may overlap.
        """
        if self.values.shape != before.values.shape or not np.array_equal(self.instructions, before.instructions):
            raise ValueError("the two were measured on other rows")
        change = self.values - before.values
        return _figures(change, self.instructions, self.labels, _OF_CHANGE, _BOUNDS_OF_CHANGE, seed)


def system_gain(
    model: Any,
    rows: Sequence[Variants],
    accelerator: "Accelerator | None" = None,
    *,
    tokens_per_batch: int = 8_192,
    seed: int = 0,
    resamples: int = RESAMPLES,
    permutations: int = PERMUTATIONS,
    scores: Scores | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SystemGain:
    """Measure `model` on `rows`; `accelerator`, `tokens_per_batch` and `on_progress` as of `log_likelihoods`.

    `scores` keeps what is computed, and what it holds isn't computed again.

    All processes of the accelerator must call it with the same rows, and get the same.
    Raises UserError where there is no row, or where a likelihood isn't finite.
    """
    if not rows:
        raise UserError("system gain: no row is left that has a system message, an answer and another message.")
    pieces = [piece for row in rows for variant in row.all for piece in variant]
    known = {place: score for place, piece in enumerate(pieces) if scores and (score := scores.find(piece)) is not None}

    def keep(places: Sequence[int], sums: Sequence[float]) -> None:
        if scores:
            scores.add([pieces[place] for place in places], sums)

    if on_progress and known:
        on_progress(len(known))
    found = log_likelihoods(
        model,
        pieces,
        accelerator,
        tokens_per_batch=tokens_per_batch,
        known=known,
        on_progress=on_progress,
        on_scored=keep,
    )
    sums = iter(found.tolist())
    values = np.empty((len(rows), len(MEASURES)))
    for number, row in enumerate(rows):
        own, *others, none = (sum(next(sums) for _ in variant) for variant in row.all)
        values[number] = of_row(own, others, none, row.tokens)
    broken = np.flatnonzero(~np.isfinite(values).all(1))
    if len(broken):
        raise UserError(
            f"system gain: {rows[int(broken[0])].place}: the model gives its answer no finite likelihood "
            f"({len(broken)} of {len(rows)} rows). Its weights or its dtype are at fault: try float32."
        )
    instructions = np.array([row.instruction for row in rows])
    labels = [row.labels for row in rows]
    options = {"resamples": resamples, "permutations": permutations}
    figures = _figures(values, instructions, labels, _NO_EFFECT, _BOUNDS, seed, **options)
    overall = figures.pop(None)
    return SystemGain(
        overall,
        {label: of_label for label, of_label in figures.items() if label is not None},
        values,
        instructions,
        labels,
        with_siblings=sum(row.siblings for row in rows),
        other_tokens=sum(not row.same_answer for row in rows),
    )


def of_row(own: float, others: Sequence[float], none: float, tokens: int) -> tuple[float, float, float, float]:
    """The four measures of one row, from its sums of log-probabilities."""
    gains = [(own - other) / tokens for other in [*others, none]]
    likelier = [0.5 if gain == 0 else float(gain > 0) for gain in gains]
    return float(np.mean(gains[:-1])), float(np.mean(likelier[:-1])), gains[-1], likelier[-1]


def _figures(
    values: NDArray[np.float64],
    instructions: NDArray[np.int64],
    labels: Sequence[tuple[Label, ...]],
    no_effect: NDArray[np.float64],
    bounds: Sequence[Bounds],
    seed: int,
    **options: int,
) -> dict[Label | None, Figures]:
    """The figures of all rows (None) and of those of each label, the labels that all rows have left out."""
    counts = Counter(label for of_row in labels for label in of_row)
    found: dict[Label | None, Figures] = {}
    for label in [None, *sorted(label for label, count in counts.items() if count < len(labels))]:
        chosen = np.array([label is None or label in of_row for of_row in labels])
        measured = estimate_means(values[chosen], instructions[chosen], no_effect, bounds, seed=seed, **options)
        found[label] = Figures(int(chosen.sum()), len(np.unique(instructions[chosen])), *measured)
    return found


def markdown(measured: Mapping[str, SystemGain], change: Mapping[Label | None, Figures] | None = None) -> str:
    """A table of one model or several (name -> figures) on the same rows, and of the change where it is given."""
    first = next(iter(measured.values()))
    lines = ["|  | " + " | ".join(measured) + (" | change |" if change else " |"), "|---" * (len(measured) + 1) + "|"]
    lines[1] += "---|" if change else ""
    titles = {
        "gain": "gain over other messages (nats/token)",
        "accuracy": "preference accuracy over other messages",
        "gain_over_none": "gain over no message (nats/token)",
        "accuracy_over_none": "preference accuracy over no message",
    }
    for measure, title in titles.items():
        cells = [_cell(getattr(one.overall, measure), measure) for one in measured.values()]
        cells += [_cell(getattr(change[None], measure), measure, signed=True)] if change else []
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    overall = first.overall
    of = f"{format_count(overall.rows, 'row')} of {format_count(overall.instructions, 'instruction')}"
    lines += ["", f"{of}; 95 % intervals over instructions, and p against no effect (sign flips)."]
    if first.groups:
        lines += ["", "Gain over other messages, by what the data says:", ""]
        lines += ["| of | is | rows | " + " | ".join(measured) + (" | change |" if change else " |")]
        lines += ["|---" * (len(measured) + 3 + bool(change)) + "|"]
        for label, figures in first.groups.items():
            cells = [_cell(one.groups[label].gain, "gain") for one in measured.values()]
            cells += [_cell(change[label].gain, "gain", signed=True)] if change else []
            of, value = (text.replace("|", "\\|").replace("\n", " ") for text in label)
            lines.append(f"| {of} | {value} | {figures.rows:,} | " + " | ".join(cells) + " |")
    lines += ["", *explained] if (explained := explain_missing_intervals("\n".join(lines), "instructions")) else []
    return "\n".join(lines) + "\n"


def _cell(estimate: Estimate, measure: str, *, signed: bool = False) -> str:
    """`0.412 [0.380, 0.447] p<0.001`, or `0.412 (n = 2) p=0.501`."""
    shares = measure.startswith("accuracy")
    sign = "+" if signed or not shares else ""
    numbers = f"{sign}.1%" if shares else f"{sign}.3f"
    bounds = f" ({estimate.missing})" if estimate.missing else f" [{estimate.low:{numbers}}, {estimate.high:{numbers}}]"
    p = "p<0.001" if estimate.p < 0.001 else f"p={estimate.p:.3f}"
    return f"{estimate.mean:{numbers}}{bounds} {p}"
