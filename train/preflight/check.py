"""TODO: train.preflight.check.check."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from train.cli import OutputLostError
from train.data.chat.system_role import Probe
from train.data.prepare import examine
from train.errors import UserError
from train.preflight.json_report import write
from train.preflight.page import show
from train.preflight.plan.plan import Cluster
from train.preflight.report import build_report
from train.recipe import Recipe

if TYPE_CHECKING:  # --check does without both, and importing them takes seconds
    pass


def check(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    before: Probe,
    *,
    checkpoint: Path | None = None,
    finished: str | None = None,
    cluster: Cluster | None = None,
    json_file: Path | None = None,
    model_notes: Sequence[str] = (),
) -> None:
    """Examine the data, print the report on standard output and write it to `json_file`.

    `template`: which one, in words; `before`: what it did as it came. Raises UserError where something keeps a run
    from starting: after the report, or before it if there is nothing to report on.
    """
    data = examine(recipe, tokenizer)
    report = build_report(
        recipe,
        tokenizer,
        data,
        template,
        before,
        checkpoint=checkpoint,
        finished=finished,
        cluster=cluster,
        model_notes=model_notes,
    )
    faults = [report.error] if report.error else []
    output_lost = None
    try:
        show(report, [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()], Console(file=sys.stdout))
    except UserError as fault:
        faults.append(str(fault))
    except OutputLostError as lost:
        if lost.reader_left:
            output_lost = lost
        else:
            faults.append(str(lost))
    if json_file:
        try:
            write(dataclasses.asdict(report), json_file)
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError(" ".join(faults))
    if output_lost:
        raise output_lost
