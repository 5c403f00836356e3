"""What a run is about to do: on one screen before its first step, and on the long page of --check.

    accelerate launch train/sft.py --recipe FILE --check [--json FILE]

reads, encodes and packs the rows as training would, loads no weights and starts no process group.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from train.data.prepare import Account, Prepared, examine
from train.data.survey import Bin
from train.errors import UserError
from train.plan import Cluster, describe
from train.preflight_report import (
    Example,
    Outcome,
    PartReport,
    Piece,
    Report,
    Rhythm,
    outcomes,
    survey,
    warnings_of,
    write_json,
)
from train.recipe import Recipe

if TYPE_CHECKING:  # --check does without both, and importing them takes seconds
    from transformers import PreTrainedModel
    from trl import SFTConfig

_NAME = 12
_BAR = 40
_MARKS = (("⟦", "⟧"), ("⟪", "⟫"), ("⦅", "⦆"), ("<<<", ">>>"))
_TRAINED, _CONTROL, _ASIDE = "bold green", "magenta", "dim"
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), 0x2426)


def check(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    probe_lines: Sequence[str] = (),
    *,
    checkpoint: Path | None = None,
    cluster: Cluster | None = None,
    json_file: Path | None = None,
) -> None:
    """Examine the data, print the report on standard output and write it to `json_file`.

    `template` and `probe_lines`: which template, and what is known of it, in words. Raises UserError where rows keep
    a run from starting: after the report, or before it if there is nothing to report on.
    """
    data = examine(recipe, tokenizer)
    report = survey(recipe, tokenizer, data, template, probe_lines, checkpoint=checkpoint, cluster=cluster)
    if json_file:
        write_json(report, json_file)
    console = Console(file=sys.stdout)
    coloured = console.is_terminal and not console.no_color
    shown = page(report, [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()], coloured=coloured)
    if coloured:
        console.print(shown, soft_wrap=True)
    else:
        encoding = sys.stdout.encoding or "utf-8"
        print(shown.plain.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    if report.error:
        raise UserError(report.error)


def page(report: Report, control_tokens: Sequence[str], *, coloured: bool) -> Text:
    """The whole report. Without colours the trained text stands between marks that no row shown holds."""
    text = Text()

    def line(name: str, value: str, style: str = "") -> None:
        text.append(f"{name:<{_NAME}}", "bold").append(f"{visible(value)}\n", style)

    line("model", f"{report.model}, {report.dtype}")
    line("template", report.template)
    for sentence in report.probe:
        line("", sentence)
    text.append("\n")
    _show_examples(text, report.examples, control_tokens, coloured=coloured)
    for name, part in (("training", report.training), ("validation", report.validation)):
        if part:
            shown = _describe_part(part) + (_bars(part.histogram) if name == "training" else [])
            for number, value in enumerate(shown):
                line("" if number else name, value)
    for number, one in enumerate(report.outcomes):
        line("" if number else "not as is", _describe_outcome(one), "yellow")
    if not report.outcomes:
        line("not as is", "no row was refused, left out, dropped or truncated")
    for warning in report.warnings:
        line("warning", warning, "yellow")
    if not any(part and part.duplicates.rows for part in (report.training, report.validation)):
        line("duplicates", "none")
    if report.validation and not report.overlap.questions.rows:
        line("overlap", "no validation row begins with a user message that training has")
    for number, value in enumerate(_describe_schedule(report)):
        line("" if number else "steps", value)
    for number, value in enumerate(describe(report.plan) if report.plan else ()):
        line("" if number else "plan", value)
    line("output", report.output_dir + (f", going on from {report.resumes_from}" if report.resumes_from else ""))
    text.append("\nready" if report.ready else "\nnot ready", "bold green" if report.ready else "bold red")
    return text


def _show_examples(text: Text, examples: list[Example], control_tokens: Sequence[str], *, coloured: bool) -> None:
    marks = None if coloured else marks_for(piece for example in examples for piece in example.pieces)
    if examples:
        how = "in green" if marks is None else f"between {marks[0]} and {marks[1]}"
        text.append(f"{len(examples)} rows, what is trained {how}\n", "bold")
    control = re.compile("|".join(map(re.escape, sorted(set(control_tokens), key=len, reverse=True))) or r"(?!)")
    for example in examples:
        about = f"{example.tokens:,} tokens, {example.trained_tokens:,} trained"
        system = "with" if example.system_message else "without"
        text.append(f"--- {visible(example.place)}: {about}, {system} a system message\n", _ASIDE)
        room = max(80, 1_200 // len(example.pieces))
        short = [Piece(shortened(visible(piece.text), room), piece.trained) for piece in example.pieces]
        if marks:
            text.append(marked(short, marks))
        else:
            for piece in short:
                start = len(text)
                text.append(piece.text, _TRAINED if piece.trained else "")
                for found in [] if piece.trained else control.finditer(piece.text):
                    text.stylize(_CONTROL, start + found.start(), start + found.end())
        text.append("\n" if text.plain.endswith("\n") else "\n\n")


def marks_for(pieces: Iterable[Piece]) -> tuple[str, str]:
    """The first pair of marks that none of the texts holds."""
    whole = "".join(piece.text for piece in pieces)
    return next((pair for pair in _MARKS if not any(mark in whole for mark in pair)), _MARKS[-1])


def marked(pieces: Sequence[Piece], marks: tuple[str, str]) -> str:
    """The text of a row with marks around what is trained; without the marks it is the row's text again."""
    return "".join(f"{marks[0]}{piece.text}{marks[1]}" if piece.trained else piece.text for piece in pieces)


def shortened(text: str, room: int) -> str:
    """`text` in about `room` characters: its middle is left out, never its ends, where training begins or stops."""
    if len(text) - room < 40:
        return text
    half = room // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def visible(text: str) -> str:
    """Control characters but for line breaks and tabs as pictures: a row must not drive the terminal."""
    return text.translate(_PICTURES)


def _describe_part(part: PartReport) -> list[str]:
    share = part.trained_tokens / max(part.tokens, 1)
    system = part.rows_with_system_message / max(part.rows, 1)
    lines = [
        f"{_counted(part.rows, 'row')}, {_counted(part.tokens, 'token')}, {share:.1%} of them trained",
        f"{system:.1%} of the rows with a system message, {part.distinct_system_messages:,} different ones",
    ]
    if part.filling is not None:
        lines.append(
            f"packed into {_counted(part.sequences, 'sequence')}, {part.filling:.1%} full, of "
            f"{part.documents_per_sequence_mean:.1f} rows each (at most {part.documents_per_sequence_max:,})"
        )
    if part.lengths:
        spread = ", ".join(f"{percent}% {length:,}" for percent, length in part.lengths.items())
        lines.append(f"tokens of a row that so many don't exceed: {spread}")
        lines.append(f"the longest is {part.longest_place}")
    return lines


def _bars(bins: list[Bin]) -> list[str]:
    """A histogram, one line a bin; a bin with any row has a bar."""
    most = max((bin.rows for bin in bins), default=0)
    labels = [f"{bin.start:,} to {bin.end - 1:,}" for bin in bins]
    width = max(map(len, labels), default=0)
    return [
        f"{label:>{width}}  {'█' * -(-bin.rows * _BAR // most)} {bin.rows:,}"
        for label, bin in zip(labels, bins, strict=True)
    ]


def _describe_outcome(one: Outcome) -> str:
    return f"{_counted(one.rows, 'row')} {one.outcome}, {one.reason}: first {one.examples[0]}"


def _describe_schedule(report: Report) -> list[str]:
    steps = report.schedule
    lines = [
        f"{steps.steps:,} in all, {steps.steps_per_epoch:,} an epoch of {report.training.tokens:,} tokens, "
        f"{steps.epochs:.3g} epochs; {_counted(steps.processes, 'process')}",
        f"each of {_counted(steps.sequences_per_step, 'sequence')}, about {steps.tokens_per_step:,.0f} tokens",
    ]
    if steps.warmup_steps:
        lines.append(f"the first {steps.warmup_steps:,} are warm-up")
    if report.validation:
        lines.append(f"evaluated {_describe_rhythm(steps.evaluation)}")
    lines.append(f"saved {_describe_rhythm(steps.saving)}")
    return lines


def _describe_rhythm(rhythm: Rhythm) -> str:
    if rhythm.strategy == "steps":
        return f"every {_counted(rhythm.steps or 0, 'step')}"
    return {"no": "at the end", "epoch": "after each epoch", "best": "where it is the best so far"}[rhythm.strategy]


def _counted(count: int, noun: str) -> str:
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{'' if count == 1 else plural}"


def screen(recipe: Recipe, template: str, data: Prepared, model: "PreTrainedModel", arguments: "SFTConfig") -> str:
    """Model, data, batches and what is trained, as lines of plain text. `template`: which one, in words."""
    from train.loop.trainer import optimizer_steps, sequences_per_step

    trained, total = _parameters(model)
    kind = "full fine-tuning" if recipe.adapter is None else f"LoRA r={recipe.adapter.r}"
    if recipe.quantization is not None:
        kind += f" on 4-bit {recipe.quantization.bnb_4bit_quant_type}"
    steps = optimizer_steps(data.train.rows, arguments)
    lines = [
        ("model", f"{recipe.model.name_or_path}, {recipe.model.dtype}, attention {model.config._attn_implementation}"),
        ("training", f"{kind}: {trained:,} of {total:,} parameters ({trained / total:.2%})"),
        ("template", template),
        *_describe("data", data.train.account, recipe),
        *(_describe("validation", data.validation.account, recipe) if data.validation else []),
        *(
            ("", f"{one.rows:,} rows {one.outcome}, {one.reason}: first {one.examples[0]}")
            for one in outcomes(data, recipe)
        ),
        *(("warning", visible(warning)) for warning in warnings_of(data)),
        (
            "steps",
            f"{steps:,} of {sequences_per_step(arguments)} rows, about "
            f"{data.train.account.tokens_per_sequence * sequences_per_step(arguments):,.0f} tokens; "
            f"{arguments.world_size} process{'es' if arguments.world_size > 1 else ''}",
        ),
        ("output", recipe.output_dir),
    ]
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _describe(name: str, account: Account, recipe: Recipe) -> list[tuple[str, str]]:
    share = account.trained_tokens / max(account.tokens, 1)
    lines = [(name, f"{account.rows:,} rows, {account.tokens:,} tokens, {share:.1%} of them trained")]
    if recipe.data.packing:
        filling = account.tokens / max(account.sequences * recipe.data.max_length, 1)
        lines.append(
            ("", f"packed into {account.sequences:,} sequences of {recipe.data.max_length:,}, {filling:.1%} full")
        )
    if account.overlong_tokens:
        lines.append(("", f"{account.overlong_tokens:,} tokens lost of rows over {recipe.data.max_length:,} tokens"))
    return lines


def _parameters(model: "PreTrainedModel") -> tuple[int, int]:
    """Parameters trained and in all; quantized ones count for what they stand for, ZeRO-3's with their whole size."""
    trained = total = 0
    for parameter in model.parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        if parameter.__class__.__name__ == "Params4bit":
            size = parameter.quant_state.shape.numel() if parameter.quant_state else size
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total
