"""System gain: how far a model follows the system message, measured without a judge and without generation.

For a row of instruction x, system message s and reference answer y, and other messages s'_1 .. s'_K (see
`train.system_gain.variants`), with L(y | s, x) = the sum of ln p over the trained tokens of y, under the template and
policy that the model is trained with:

    gain                = mean over k of  (L(y | s, x) - L(y | s'_k, x)) / tokens of y       nats per token
    preference accuracy = mean over k of  [L(y | s, x) > L(y | s'_k, x)], a tie counting half

and the same over no system message: the prompt of a row without one, which some templates render with a default.
Figures are means over rows. Each has a 95 % interval and the p of a test against no effect (gain 0, accuracy one half),
both over instructions (`train.resampling`). The groups are tested separately: of twenty without an effect one has
p < 0.05.

The tokens of y are the same under each message, unless a template joins them with the text before. Then sums are still
compared, divided by the number of tokens under the row's own message, and `other_tokens` counts such rows.

Limits:

- It scores the reference answer, not what the model would write. A model can find the right answer likelier and still
  write another: a gain is necessary for following a message, but not sufficient (`scripts/evaluate.py rules` counts
  followed messages).
- Words that s and y share give a gain (a message that says "Ahoy" makes "Ahoy" likely), in style as in substance.
- It is a mean over tokens, and mostly the first ones of an answer depend on the message: a long answer has a small
  gain, one of a word or two a large one, and each counts as one row. Compare gains over the same rows only. The
  accuracy doesn't depend on length in this way.
- Two messages that ask for the same thing have no gain over one another, whatever the model does.
- Over no message, any text of the right domain helps, and many models have rarely seen prompts without one: the gain
  over other messages is the stricter figure. With siblings each answer is scored under each message. Messages of other
  rows may differ from s in subject too, which makes the gain larger: don't compare the two kinds.

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
from train.system_gain.log_likelihood import compute_log_likelihoods
from train.system_gain.variants import Label, Variants

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURES = ("gain", "accuracy", "gain_over_none", "accuracy_over_none")
_NO_EFFECT = np.array([0.0, 0.5, 0.0, 0.5])
_OF_CHANGE = np.zeros(4)
_BOUNDS: tuple[Bounds, ...] = (None, SHARE_BOUNDS, None, SHARE_BOUNDS)
_BOUNDS_OF_CHANGE: tuple[Bounds, ...] = (None, DIFFERENCE_BOUNDS, None, DIFFERENCE_BOUNDS)


class Scores(Protocol):
    """A store of sums of log-probabilities."""

    def find(self, row: EncodedRow) -> float | None:
        """Return the sum of a row, or None if it isn't stored."""

    def add(self, rows: Sequence[EncodedRow], scores: Sequence[float]) -> None:
        """Store the sums of further rows."""


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
        """Return the figures as JSON."""
        measures = {name: getattr(self, name).record() for name in MEASURES}
        return {"rows": self.rows, "instructions": self.instructions, **measures}


@dataclass(frozen=True, eq=False)
class SystemGain:
    """Result of a measurement.

    - `overall`: figures of all rows; `groups`: of the rows of each label that some, but not all, rows have;
    - `values`: the four `MEASURES` of each row, [rows, 4]; `instructions`: number of each row's instruction, [rows];
    - `with_siblings`: rows scored under the messages of siblings; `other_tokens`: rows whose answer has other tokens
      under another message.
    """

    overall: Figures
    groups: Mapping[Label, Figures]
    values: NDArray[np.float64]
    instructions: NDArray[np.int64]
    labels: Sequence[tuple[Label, ...]]
    with_siblings: int
    other_tokens: int

    def metrics(self, prefix: str = "eval_") -> dict[str, float]:
        """Return the overall figures by name, as a trainer logs them."""
        metrics: dict[str, float] = {}
        for measure in MEASURES:
            estimate: Estimate = getattr(self.overall, measure)
            name = f"{prefix}system_{measure}"
            bounds = {"_low": estimate.low, "_high": estimate.high, "_p": estimate.p}
            metrics |= {
                name: estimate.mean,
                **{name + end: value for end, value in bounds.items() if value is not None},
            }
        return metrics

    def record(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return {
            "overall": self.overall.record(),
            "groups": [{"of": of, "is": value, **figures.record()} for (of, value), figures in self.groups.items()],
            "rows_with_siblings": self.with_siblings,
            "rows_with_other_tokens": self.other_tokens,
        }

    def change_from(self, before: "SystemGain", *, seed: int = 0) -> dict[Label | None, Figures]:
        """Return this minus `before`, paired by row: overall (None) and of each group.

        Paired differences are much more precise than a comparison of two intervals. Raises ValueError if `before`
        measured other rows.
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
    """Measure `model` on `rows`.

    - `accelerator`, `tokens_per_batch`, `on_progress`: as of `compute_log_likelihoods`. All processes of the
      accelerator must call it with the same rows, and get the same result;
    - `scores`: a store of sums, which are not computed again.

    Raises UserError if there is no row, or if a likelihood isn't finite.
    """
    if not rows:
        raise UserError("system gain: no row has a system message, an answer and another message.")
    pieces = [piece for row in rows for variant in row.all for piece in variant]
    cached = {
        index: score for index, piece in enumerate(pieces) if scores and (score := scores.find(piece)) is not None
    }

    def store(batch: Sequence[int], sums: Sequence[float]) -> None:
        if scores:
            scores.add([pieces[index] for index in batch], sums)

    if on_progress and cached:
        on_progress(len(cached))
    log_likelihoods = compute_log_likelihoods(
        model,
        pieces,
        accelerator,
        tokens_per_batch=tokens_per_batch,
        cached=cached,
        on_progress=on_progress,
        on_scored=store,
    )
    sums = iter(log_likelihoods.tolist())
    values = np.empty((len(rows), len(MEASURES)))
    for number, row in enumerate(rows):
        own, *others, none = (sum(next(sums) for _ in variant) for variant in row.all)
        values[number] = measure_row(own, others, none, row.tokens)
    broken = np.flatnonzero(~np.isfinite(values).all(1))
    if len(broken):
        raise UserError(
            f"system gain: {rows[int(broken[0])].place}: the model gives its answer no finite likelihood "
            f"({len(broken)} of {len(rows)} rows). Check its weights, or try float32."
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


def measure_row(own: float, others: Sequence[float], none: float, tokens: int) -> tuple[float, float, float, float]:
    """Return the four measures of one row from its sums of log-probabilities."""
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
    """Return the figures of all rows (None) and of the rows of each label, except labels that all rows have."""
    counts = Counter(label for of_row in labels for label in of_row)
    figures: dict[Label | None, Figures] = {}
    for label in [None, *sorted(label for label, count in counts.items() if count < len(labels))]:
        chosen = np.array([label is None or label in of_row for of_row in labels])
        measured = estimate_means(values[chosen], instructions[chosen], no_effect, bounds, seed=seed, **options)
        figures[label] = Figures(int(chosen.sum()), len(np.unique(instructions[chosen])), *measured)
    return figures


def render_table(measured: Mapping[str, SystemGain], change: Mapping[Label | None, Figures] | None = None) -> str:
    """Return a Markdown table of models (name -> figures) on the same rows, with a column for the change, if given."""
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
        cells = [_cell(getattr(gain.overall, measure), measure) for gain in measured.values()]
        cells += [_cell(getattr(change[None], measure), measure, signed=True)] if change else []
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    overall = first.overall
    of = f"{format_count(overall.rows, 'row')} of {format_count(overall.instructions, 'instruction')}"
    lines += ["", f"{of}; 95 % intervals over instructions, and p against no effect (sign flips)."]
    if first.groups:
        lines += ["", "Gain over other messages, by label:", ""]
        lines += ["| of | is | rows | " + " | ".join(measured) + (" | change |" if change else " |")]
        lines += ["|---" * (len(measured) + 3 + bool(change)) + "|"]
        for label, figures in first.groups.items():
            cells = [_cell(gain.groups[label].gain, "gain") for gain in measured.values()]
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
