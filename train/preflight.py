"""What a run is about to do: on one screen before its first step, and on the long page of --check.

    accelerate launch train/sft.py --recipe FILE --check [--json FILE]

reads, encodes and packs the rows as training would, loads no weights and starts no process group.
"""

import dataclasses
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain, count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from train.data.outcomes import describe_outcome, outcomes, warnings_of
from train.data.prepare import Account, Prepared, examine
from train.data.survey import Bin
from train.data.system_role import Probe
from train.errors import UserError
from train.json_report import write
from train.plan import Cluster, describe
from train.preflight_report import (
    Example,
    PartReport,
    Piece,
    Report,
    Rhythm,
    survey,
)
from train.progress import counted
from train.recipe import Recipe

if TYPE_CHECKING:  # --check does without both, and importing them takes seconds
    from transformers import PreTrainedModel
    from trl import SFTConfig

_NAME = 12
_BAR = 40
_MARKS = (("⟦", "⟧"), ("⟪", "⟫"), ("⦅", "⦆"))
_TRAINED, _CONTROL, _ASIDE = "bold green", "magenta", "dim"
_PICTURES: dict[int, str] = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: "␡"} | dict.fromkeys(range(0x80, 0xA0), "␦")
# What turns the order of letters around, so that a row could read otherwise than it is (CVE-2021-42574).
_PICTURES |= {
    code: f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
}
_POLICIES = {
    "assistant": "every answer is trained, with its end token",
    "last": "the last answer of each conversation is trained, with its end token",
    "error": "a row with a control token typed in its text is refused",
    "escape": "control tokens typed in a text are broken up by an invisible character (U+200B)",
    "allow": "control tokens typed in a text are control tokens",
}


def check(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    before: Probe,
    *,
    checkpoint: Path | None = None,
    cluster: Cluster | None = None,
    json_file: Path | None = None,
    model_notes: Sequence[str] = (),
) -> None:
    """Examine the data, print the report on standard output and write it to `json_file`.

    `template`: which one, in words; `before`: what it did as it came. Raises UserError where something keeps a run
    from starting: after the report, or before it if there is nothing to report on.
    """
    data = examine(recipe, tokenizer)
    report = survey(
        recipe, tokenizer, data, template, before, checkpoint=checkpoint, cluster=cluster, model_notes=model_notes
    )
    faults = [report.error] if report.error else []
    reader_left = None
    try:
        show(report, [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()], Console(file=sys.stdout))
    except UserError as fault:
        faults.append(str(fault))
    except BrokenPipeError as fault:
        reader_left = fault
    if json_file:
        try:
            write(dataclasses.asdict(report), json_file)
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError(" ".join(faults))
    if reader_left:
        raise reader_left


def show(report: Report, control_tokens: Sequence[str], console: Console) -> None:
    """Print the page: what is trained is coloured where `console` can, or else stands between marks.

    Raises UserError where it can't be printed, BrokenPipeError where nobody reads on.
    """
    if sys.stdout is None:
        raise UserError("standard output is closed, so the report can't be shown. Leave it open.")
    coloured = console.color_system is not None and not console.no_color
    shown = page(report, control_tokens, coloured=coloured)
    text = f"{shown.plain}\n"
    if coloured:
        with console.capture() as captured:
            console.print(shown, soft_wrap=True)
        text = captured.get()
    encoding = console.encoding
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=console.file, flush=True)
    except OSError as fault:
        # Python flushes once more as it ends, and would print a traceback for it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), console.file.fileno())
        if isinstance(fault, BrokenPipeError):
            raise
        raise UserError(f"standard output can't be written: {fault.strerror}.") from fault


def page(report: Report, control_tokens: Sequence[str], *, coloured: bool) -> Text:
    """The whole report. Without colours the trained text stands between marks that no row shown holds."""
    text = Text()

    def line(name: str, value: str, style: str = "") -> None:
        text.append(f"{name:<{_NAME}}", "bold").append(f"{visible(value)}\n", style)

    line("model", f"{report.model}, {report.dtype}" + (f", float8 {report.float8}" if report.float8 else ""))
    line("template", report.template)
    for sentence in report.probe:
        line("", sentence)
    line("system", f"chat.system_role: {report.chat['system_role']}")
    for sentence in report.system_messages:
        line("", sentence)
    for name, key in (("trained", "train_on"), ("control", "control_tokens_in_text")):
        line(name, f"chat.{key}: {report.chat[key]}, {_POLICIES[report.chat[key]]}")
    for number, cache in enumerate(report.caches):
        found = "found" if cache.hit else "made now"
        line("" if number else "cache", f"{cache.source}: {cache.key[:8]}..., {found}; tokens by {cache.how}")
    text.append("\n")
    _show_examples(text, report.examples, control_tokens, coloured=coloured)
    for name, part in (("training", report.training), ("validation", report.validation)):
        if part:
            shown = _describe_part(part) + (_bars(part.histogram) if name == "training" else [])
            for number, value in enumerate(shown):
                line("" if number else name, value)
    for number, one in enumerate(report.outcomes):
        line("" if number else "not as is", describe_outcome(one), "yellow")
    if not report.outcomes:
        line("not as is", "no row was refused, left out, dropped or truncated")
    for warning in report.warnings:
        line("warning", warning, "yellow")
    if not any(part and part.duplicates.rows for part in (report.training, report.validation)):
        line("duplicates", "none")
    if report.validation and not report.overlap.questions.rows:
        line("overlap", "no validation row begins with a user message that training has")
    if report.system_gain:
        line("system gain", report.system_gain)
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
        text.append(f"{counted(len(examples), 'row')}, what is trained {how}\n", "bold")
    control = re.compile("|".join(map(re.escape, sorted(set(control_tokens), key=len, reverse=True))) or r"(?!)")
    for example in examples:
        about = f"{example.tokens:,} tokens, {example.trained_tokens:,} trained"
        system = f"{'with' if example.system_message else 'without'} a system message"
        system += " of its own, with the default" if example.default_system else ""
        text.append(f"--- {visible(example.place)}: {about}, {system}\n", _ASIDE)
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
    """The first pair of marks that none of the texts holds; there is always one."""
    whole = "".join(piece.text for piece in pieces)
    numbered = ((f"⟦{number}⟦", f"⟧{number}⟧") for number in count(1))
    return next(pair for pair in chain(_MARKS, numbered) if not any(mark in whole for mark in pair))


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
    """Control characters but for line breaks and tabs as pictures or escapes: a row must not drive the terminal."""
    return text.translate(_PICTURES)


def _describe_part(part: PartReport) -> list[str]:
    share = part.trained_tokens / max(part.tokens, 1)
    system = part.rows_with_system_message / max(part.rows, 1)
    lines = [
        f"{counted(part.rows, 'row')}, {counted(part.tokens, 'token')}, {share:.1%} of them trained",
        f"{system:.1%} of the rows with a system message, "
        f"{counted(part.distinct_system_messages, 'different one')}"
        + (
            f"; {counted(part.rows_with_default_system, 'row')} with the default"
            if part.rows_with_default_system
            else ""
        ),
    ]
    if part.rows_of_conversations > part.conversations:
        lines.append(
            f"{counted(part.conversations, 'conversation')} became {counted(part.rows_of_conversations, 'row')}, as "
            "the template rewrites earlier turns"
        )
    if part.filling is not None:
        lines.append(
            f"packed into {counted(part.sequences, 'sequence')}, {part.filling:.1%} full, of "
            f"{part.documents_per_sequence_mean:.1f} rows each (at most {part.documents_per_sequence_max:,})"
        )
    lengths = [*part.lengths.items()]
    if len(set(part.lengths.values())) > 1:
        # Of percents that share a length the last says most: so many rows at least don't exceed it.
        last = [pair for pair, after in pairwise([*lengths, ("", -1)]) if pair[1] != after[1]]
        spread = ", ".join(f"{percent}% {length:,}" for percent, length in last)
        lines.append(f"tokens of a row that so many don't exceed: {spread}")
        lines.append(f"the longest is {part.longest_place}")
    return lines


def _bars(bins: list[Bin]) -> list[str]:
    """A histogram, one line a bin that has any row; nothing where one bin has all."""
    bins = [bin for bin in bins if bin.rows]
    if len(bins) < 2:
        return []
    most = max(bin.rows for bin in bins)
    labels = [f"{bin.start:,}" + (f" to {bin.end - 1:,}" if bin.end - bin.start > 1 else "") for bin in bins]
    width = max(map(len, labels))
    return [
        f"{label:>{width}}  {'█' * -(-bin.rows * _BAR // most)} {bin.rows:,}"
        for label, bin in zip(labels, bins, strict=True)
    ]


def _describe_schedule(report: Report) -> list[str]:
    steps = report.schedule
    lines = [
        f"{steps.steps:,} in all, {steps.steps_per_epoch:,} an epoch of {report.training.tokens:,} tokens, "
        f"{steps.epochs:.3g} {'epoch' if steps.epochs == 1 else 'epochs'}; {counted(steps.processes, 'process')}",
        f"each of {counted(steps.sequences_per_step, 'sequence')}, about {steps.tokens_per_step:,.0f} tokens",
    ]
    if steps.warmup_steps:
        lines.append(f"the first {steps.warmup_steps:,} are warm-up")
    if report.validation:
        lines.append(f"evaluated {_describe_rhythm(steps.evaluation)}")
    lines.append(f"saved {_describe_rhythm(steps.saving)}")
    return lines


def _describe_rhythm(rhythm: Rhythm) -> str:
    if rhythm.strategy == "steps":
        return f"every {counted(rhythm.steps or 0, 'step')}"
    return {"no": "at the end", "epoch": "after each epoch", "best": "where it is the best so far"}[rhythm.strategy]


def screen(
    recipe: Recipe,
    template: str,
    data: Prepared,
    model: "PreTrainedModel",
    arguments: "SFTConfig",
    system_gain: str | None = None,
    model_notes: Sequence[str] = (),
) -> str:
    """Model, data, batches and what is trained, as lines of plain text. `template`, `system_gain`: which, in words."""
    from train.loop.arguments import optimizer_steps, sequences_per_step
    from train.model.attention import attention_for
    from train.model.float8 import float8_warnings

    trained, total = _parameters(model)
    kind = "full fine-tuning" if recipe.adapter is None else f"LoRA r={recipe.adapter.r}"
    if recipe.quantization is not None:
        kind += f" on 4-bit {recipe.quantization.bnb_4bit_quant_type}"
    steps = optimizer_steps(data.train.rows, arguments)
    together = min(sequences_per_step(arguments), len(data.train.rows))
    lines = [
        ("model", f"{recipe.model.name_or_path}, {recipe.model.dtype}"),
        *(("", sentence) for sentence in model_notes),
        ("attention", str(attention_for(recipe, model.config))),
        ("training", f"{kind}: {trained:,} of {total:,} parameters ({trained / total:.2%})"),
        *(_describe_float8(recipe, data, model, arguments) if recipe.model.float8 else []),
        ("template", template),
        *_describe("data", data.train.account, recipe),
        *(_describe("validation", data.validation.account, recipe) if data.validation else []),
        *(("", visible(describe_outcome(one))) for one in outcomes(data, recipe.data)),
        *(("warning", visible(warning)) for warning in [*warnings_of(data), *float8_warnings(recipe)]),
        *([("system gain", visible(system_gain))] if system_gain else []),
        (
            "steps",
            f"{steps:,} of {counted(together, 'sequence')}, about "
            f"{data.train.account.tokens_per_sequence * together:,.0f} tokens; "
            f"{counted(arguments.world_size, 'process')}",
        ),
        *([("", _describe_waiting(data, model, arguments))] if arguments.world_size > 1 else []),
        ("output", recipe.output_dir),
    ]
    return "\n".join(f"{name:<11} {value}" for name, value in lines)


def _describe_float8(
    recipe: Recipe, data: Prepared, model: "PreTrainedModel", arguments: "SFTConfig"
) -> list[tuple[str, str]]:
    """Which layers compute so, and the loss with and without. Raises UserError where rounding doesn't explain it."""
    from train.model.float8 import TOKENS, layers_of, loss_difference

    rows = data.train.rows
    longest = int(np.minimum(rows.lengths[:1_000], TOKENS).argmax())
    difference = loss_difference(model, rows.row(longest)[0].tolist(), arguments.device, bf16=bool(arguments.bf16))
    return [("float8", f"{recipe.model.float8}: {layers_of(model)}"), ("", str(difference))]


def _describe_waiting(data: Prepared, model: "PreTrainedModel", arguments: "SFTConfig") -> str:
    from train.loop.order import EpochOrder

    plain, dealt = EpochOrder(data.train.rows, arguments, model.config).waiting()
    return (
        f"ranks wait for the longest documents of others: {dealt - 1:.1%} of the time, as long ones are dealt evenly "
        f"({plain - 1:.1%} in random order)"
    )


def _describe(name: str, account: Account, recipe: Recipe) -> list[tuple[str, str]]:
    share = account.trained_tokens / max(account.tokens, 1)
    lines = [(name, f"{counted(account.rows, 'row')}, {counted(account.tokens, 'token')}, {share:.1%} of them trained")]
    if recipe.data.packing:
        filling = account.tokens / max(account.sequences * recipe.data.max_length, 1)
        sequences = counted(account.sequences, "sequence")
        lines.append(("", f"packed into {sequences} of {recipe.data.max_length:,}, {filling:.1%} full"))
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
