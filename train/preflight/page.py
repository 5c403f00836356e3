"""The page of `--check`: model, template, example rows, statistics and schedule of a run as text."""

import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, count

from rich.console import Console
from rich.text import Text

from train.data.diagnostics import describe_dropped, describe_unread
from train.data.stats import format_percentiles
from train.errors import UserError
from train.formatting import format_count, shorten, visible, wrap
from train.preflight.report import Example, PairSplitReport, Piece, PreferenceReport, Report, SplitReport
from train.recipe import PreferenceSection
from train.recipe.schedule import Cadence

_NAME = 12
_BAR = 40
_MARKS = (("⟦", "⟧"), ("⟪", "⟫"), ("⦅", "⦆"))
_TRAINED, _CONTROL, _SECONDARY = "bold green", "magenta", "dim"
_SYSTEM_WHOLE, _HEAD, _TAIL = 3_500, 3_800, 400
"""A system message is shown completely up to _SYSTEM_WHOLE characters. As it is a turn, or begins one after a role's
name or a date, a long turn in a row with a system message shows _HEAD characters of its start and _TAIL of its end."""
_ROOM, _LEAST_ROOM = 1_200, 80
"""Characters that the other turns of a row share, and the least that one of them gets."""
_POLICIES = {
    "assistant": "every answer is trained, with its end token",
    "last": "the last answer of each conversation is trained, with its end token",
    "error": "rows with a control token typed in their text are refused",
    "escape": "control tokens typed in a text are broken up by an invisible character (U+200B)",
    "allow": "control tokens typed in a text act as control tokens",
}
_PAIR_POLICIES = {
    "assistant": "answers in which the halves of a pair differ are trained, with their end token; of siblings the last",
    "last": "the last answer of each half is trained, with its end token",
}


def print_page(report: Report, control_tokens: Sequence[str], console: Console) -> None:
    """Print the page; trained text is coloured where `console` can, and stands between marks otherwise.

    Raises UserError where standard output is closed, OutputLostError (see `run_command`) where it can't be written.
    """
    if sys.stdout is None:
        raise UserError("standard output is closed, so the report can't be shown. Leave it open.")
    coloured = console.color_system is not None and not console.no_color
    shown = page(report, control_tokens, coloured=coloured, width=console.width)
    text = f"{shown.plain}\n"
    if coloured:
        with console.capture() as captured:
            console.print(shown, soft_wrap=True)
        text = captured.get()
    encoding = console.encoding
    print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=console.file, flush=True)


def page(report: Report, control_tokens: Sequence[str], *, coloured: bool, width: int) -> Text:
    """Return the complete report in lines of `width` columns; the text of example rows keeps its own lines.

    Without colours the trained text stands between marks that no example row contains.
    """
    text = Text()

    def line(name: str, value: str, style: str = "") -> None:
        indented = value.startswith("  ")  # a command, in lines of its own
        value = visible(value) if indented else wrap(visible(value), width, _NAME)
        text.append(f"{name:<{_NAME}}", "bold").append(f"{value}\n", style)

    line("model", f"{report.model}, {report.dtype}" + (f", float8 {report.float8}" if report.float8 else ""))
    if isinstance(report, PreferenceReport):
        line("preference", PreferenceSection.model_validate(report.preference).describe())
    line("template", report.template)
    for sentence in report.probe:
        line("", sentence)
    line("system", f"chat.system_role: {report.chat['system_role']}")
    for sentence in report.system_messages:
        line("", sentence)
    for name, key in (("trained", "train_on"), ("control", "control_tokens_in_text")):
        effect = _POLICIES[report.chat[key]]
        if isinstance(report, PreferenceReport):
            effect = _PAIR_POLICIES.get(report.chat[key], effect)
        line(name, f"chat.{key}: {report.chat[key]}, {effect}")
    for number, cache in enumerate(report.caches):
        state = "found" if cache.hit else "made now"
        line("" if number else "cache", f"{cache.source}: {cache.key[:8]}..., {state}; tokens by {cache.how}")
    text.append("\n")
    _show_examples(text, report.examples, control_tokens, report.training.unit, coloured=coloured, width=width)
    for name, part in (("training", report.training), ("validation", report.validation)):
        if part:
            bars = _bars(part, width - _NAME) if name == "training" else []
            shown = [*_describe_part(part), *bars]
            for number, value in enumerate(shown):
                line("" if number else name, value)
    for number, value in enumerate(report.loss_weights):
        line("" if number else "loss weight", value)
    for number, dropped in enumerate(report.outcomes):
        line("" if number else "dropped", describe_dropped(dropped), "yellow")
    if not report.outcomes:
        line("dropped", f"no {report.training.unit} was refused, skipped, dropped or truncated")
    for number, value in enumerate(describe_unread(report.unread) or ["nothing: every column and key is read"]):
        line("" if number else "not read", value)
    for warning in report.warnings:
        line("warning", warning, "yellow")
    if not any(part and part.duplicates.rows for part in (report.training, report.validation)):
        line("duplicates", "none")
    if report.validation and not report.overlap.questions.rows:
        begins = "begins with a user message" if report.training.unit == "row" else "has an instruction"
        line("overlap", f"no validation {report.training.unit} {begins} that is also in training")
    if report.system_gain:
        line("system gain", report.system_gain)
    if report.samples:
        line("samples", report.samples)
    for number, value in enumerate(_describe_schedule(report)):
        line("" if number else "steps", value)
    for number, value in enumerate(_describe_plan(report)):
        line("" if number else "plan", value)
    if report.finished:
        line("output", f"{report.output_dir}, {report.finished}: the same command trains nothing")
    else:
        line("output", report.output_dir + (f", resumes from {report.resumes_from}" if report.resumes_from else ""))
    text.append("\nready" if report.ready else "\nnot ready", "bold green" if report.ready else "bold red")
    return text


def _describe_plan(report: Report) -> list[str]:
    if report.plan is None:
        return []
    from train.preflight.plan.description import describe_plan

    return describe_plan(report.plan)


def _show_examples(
    text: Text, examples: list[Example], control_tokens: Sequence[str], unit: str, *, coloured: bool, width: int
) -> None:
    longest_first = sorted({token for token in control_tokens if token}, key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    marks = None if coloured else marks_for(piece for example in examples for piece in example.pieces)
    if examples:
        how = "is green" if marks is None else f"stands between {marks[0]} and {marks[1]}"
        count = format_count(len(examples), "example row")
        if unit == "pair":
            count = f"{format_count(len(examples) // 2, 'example pair')}, both halves of each"
        about = f"{count}; what is trained {how}"
        if any(fit(piece, example, control) != piece.text for example in examples for piece in example.pieces):
            about += (
                f". Long turns are shortened; a system message is shown completely up to {_SYSTEM_WHOLE:,} characters"
            )
        text.append(f"{wrap(about, width)}\n", "bold")
    for example in examples:
        about = f"{example.tokens:,} tokens, {example.trained_tokens:,} trained"
        system = f"{'with' if example.system_message else 'without'} a system message"
        system += " of its own, with the default" if example.default_system else ""
        if example.loss_weights != [1]:
            system += f", loss weight {', '.join(f'{weight:g}' for weight in example.loss_weights)}"
        text.append(f"{wrap(f'--- {visible(example.place)}: {about}, {system}', width)}\n", _SECONDARY)
        short = [Piece(visible(fit(piece, example, control)), piece.trained) for piece in example.pieces]
        if marks:
            text.append(marked(short, marks))
        else:
            for piece in short:
                start = len(text)
                text.append(piece.text, _TRAINED if piece.trained else "")
                for token in [] if piece.trained else control.finditer(piece.text):
                    text.stylize(_CONTROL, start + token.start(), start + token.end())
        text.append("\n" if text.plain.endswith("\n") else "\n\n")


def fit(piece: Piece, example: Example, control: re.Pattern[str]) -> str:
    """Return the text of a piece with the middle of each long turn left out, and every control token complete."""
    tokens = [*control.finditer(piece.text)]
    room, tail = max(_LEAST_ROOM, _ROOM // max(len(example.pieces), len(tokens) // 2)), None
    if not piece.trained and (example.system_message or example.default_system):
        room, tail = _HEAD + _TAIL, _TAIL
    parts, end = [], 0
    for token in tokens:
        parts += [shorten(piece.text[end : token.start()], room, tail), token[0]]
        end = token.end()
    return "".join([*parts, shorten(piece.text[end:], room, tail)])


def marks_for(pieces: Iterable[Piece]) -> tuple[str, str]:
    """Return the first pair of marks that none of the texts contains."""
    text = "".join(piece.text for piece in pieces)
    numbered = ((f"⟦{number}⟦", f"⟧{number}⟧") for number in count(1))
    return next(pair for pair in chain(_MARKS, numbered) if not any(mark in text for mark in pair))


def marked(pieces: Sequence[Piece], marks: tuple[str, str]) -> str:
    """Return the text of a row with marks around what is trained. Without the marks it is the row's text."""
    return "".join(f"{marks[0]}{piece.text}{marks[1]}" if piece.trained else piece.text for piece in pieces)


def _describe_part(part: SplitReport) -> list[str]:
    share = part.trained_tokens / max(part.tokens, 1)
    system = part.rows_with_system_message / max(part.rows, 1)
    default = part.rows_with_default_system
    lines = [
        f"{format_count(part.rows, part.unit)}, {format_count(part.tokens, 'token')}, {share:.1%} of them trained",
        f"{system:.1%} of the {part.unit}s have a system message of their own, {part.distinct_system_messages:,} "
        f"distinct{f'; {format_count(default, part.unit)} with the default' if default else ''}",
    ]
    if isinstance(part, PairSplitReport):
        lines += _describe_pairs(part)
    if part.rows_of_conversations > part.conversations:
        lines.append(
            f"{format_count(part.conversations, 'conversation')} became "
            f"{format_count(part.rows_of_conversations, 'row')}, as the template rewrites earlier turns"
        )
    if part.filling is not None:
        lines.append(
            f"packed into {format_count(part.sequences, 'sequence')}, {part.filling:.1%} full, "
            f"{part.documents_per_sequence_mean:.1f} {part.unit}s each on average "
            f"(at most {part.documents_per_sequence_max:,})"
        )
    if len(set(part.lengths.values())) > 1:
        what = "length percentiles of the longer half" if part.unit == "pair" else "row length percentiles"
        lines.append(f"{what} (tokens): {format_percentiles(part.lengths)}")
        lines.append(f"longest {part.unit}: {part.longest_place}")
        rows = sum(bar.rows for bar in part.histogram)
        if rows > part.rows:
            lines.append(f"percentiles and histogram are of all {rows:,} {part.unit}s, those that are dropped included")
    return lines


def _describe_pairs(part: PairSplitReport) -> list[str]:
    pairs, count = part.pairs, max(part.rows, 1)
    lines = [
        f"answers of {pairs.chosen_tokens / count:,.1f} tokens are chosen on average, of "
        f"{pairs.rejected_tokens / count:,.1f} rejected; the chosen one is longer in {pairs.chosen_longer / count:.1%} "
        f"of the pairs, shorter in {pairs.rejected_longer / count:.1%}"
    ]
    if pairs.siblings:
        lines.append(
            f"{format_count(pairs.siblings, 'pair')} of two rows with the same instruction: the answer under the own "
            "system message is chosen, that under the other one rejected"
        )
    return lines


def _bars(part: SplitReport, width: int) -> list[str]:
    """Return a histogram, one line for each bin with rows; nothing if one bin has all of them."""
    bins = [bin for bin in part.histogram if bin.rows]
    if len(bins) < 2:
        return []
    largest = max(bin.rows for bin in bins)
    labels = [f"{bin.start:,}" + (f" to {bin.end - 1:,}" if bin.end - bin.start > 1 else "") for bin in bins]
    longest = max(map(len, labels))
    bar = max(min(_BAR, width - longest - len(f"   {largest:,}")), 10)
    return [
        f"histogram of {'row lengths' if part.unit == 'row' else 'the longer half'} (tokens):",
        *(
            f"{label:>{longest}}  {'█' * -(-bin.rows * bar // largest)} {bin.rows:,}"
            for label, bin in zip(labels, bins, strict=True)
        ),
    ]


def _describe_schedule(report: Report) -> list[str]:
    steps = report.schedule
    epochs = f"{steps.epochs:.3g} {'epoch' if steps.epochs == 1 else 'epochs'}"
    lines = [
        f"{format_count(steps.steps, 'step')}: {epochs} of {format_count(steps.steps_per_epoch, 'step')} "
        f"({report.training.tokens:,} tokens); {format_count(steps.processes, 'process')}{steps.sharing}",
        f"{format_count(steps.sequences_per_step, 'sequence')} per step, about {steps.tokens_per_step:,.0f} tokens",
    ]
    if steps.warmup_steps:
        lines.append(f"warm-up: the first {format_count(steps.warmup_steps, 'step')}")
    if report.validation:
        lines.append(f"evaluation: {_describe_rhythm(steps.evaluation, 'at the end')}")
    lines.append(f"checkpoints: {_describe_rhythm(steps.saving, 'none, the model is saved at the end')}")
    return lines


def _describe_rhythm(rhythm: Cadence, never: str) -> str:
    if rhythm.strategy == "steps":
        return f"every {format_count(rhythm.steps or 0, 'step')}"
    return {"no": never, "epoch": "after each epoch", "best": "after each best evaluation so far"}[rhythm.strategy]
