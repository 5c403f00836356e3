"""`train/sft.py --check`: examine model, template and data of a recipe, print the report and write it as JSON.

Rows are read, encoded and packed as training does it. No weights are loaded and no process group is started.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from train.cli import OutputLostError
from train.data.prepare import examine
from train.errors import UserError
from train.loop.checkpoint.manifest import Checkpoint
from train.loop.checkpoint.resume import get_run_date
from train.loop.master_weights import master_weights_error, master_weights_note, read_launch
from train.loop.output_dir import unwritable_files
from train.loop.sharding import sharding_error
from train.model.tokenizer import check_vocabulary, load_chat_tokenizer
from train.preflight.json_report import write_json
from train.preflight.model_checks import checks_key, examine_model, passed_checks, remember_passed
from train.preflight.page import print_page
from train.preflight.report import Report, build_report
from train.recipe import Recipe

if TYPE_CHECKING:  # the plan imports modelling code
    from train.preflight.plan.cluster import Cluster


def check(
    recipe: Recipe,
    checkpoint: Checkpoint | None = None,
    *,
    finished: str | None = None,
    cluster: "Cluster | None" = None,
    elsewhere: bool = False,
    json_file: Path | None = None,
) -> None:
    """Examine a run, print its report on standard output and write it to `json_file`.

    - `checkpoint`: the one that the run would resume from;
    - `finished`: a sentence on the finished run of this recipe, if there is one;
    - `cluster`: GPUs to plan memory and time for;
    - `elsewhere`: another machine trains, so that what this one lacks is a note.

    Raises UserError if something keeps the run from starting: after the report, or before it if there is nothing to
    report on.
    """
    key = checks_key(recipe, elsewhere=elsewhere)
    earlier = passed_checks(recipe, key)
    model = earlier or examine_model(recipe, elsewhere=elsewhere)
    if checkpoint:
        from train.loop.checkpoint.resumed_settings import ResumedSettings  # imports much of transformers

        ResumedSettings(checkpoint, recipe).refuse_under_deepspeed(checkpoint)
    chat = load_chat_tokenizer(recipe.model, recipe.chat, get_run_date(checkpoint))
    check_vocabulary(chat.tokenizer, recipe.model, model.embeddings)
    launch = read_launch(recipe.training, os.environ)
    refusal = None
    if launch:
        refusal = master_weights_error(recipe, model.dtype, launch) or sharding_error(recipe, launch)
    note = None if launch else master_weights_note(recipe, model.dtype)
    data = examine(recipe, chat.tokenizer)

    side_file_errors: list[str] = []
    if earlier is None:
        from train.loop.side_files import try_side_files

        side_file_errors, names = try_side_files(recipe, chat.tokenizer)
        model = dataclasses.replace(model, side_files=names)
        if names and not side_file_errors:
            remember_passed(recipe, key, model)
    report = build_report(
        model.described(recipe),
        chat,
        data,
        errors=[*filter(None, [refusal]), *side_file_errors, *unwritable_files(recipe, model.side_files)],
        notes=[*model.notes, *filter(None, [note])],
        checkpoint=checkpoint.folder if checkpoint else None,
        finished=finished,
        cluster=cluster,
    )
    _publish(report, chat.tokenizer, json_file)


def _publish(report: Report, tokenizer: PreTrainedTokenizerBase, json_file: Path | None) -> None:
    """Print the report and write it to `json_file`; then raise what went wrong, with what the report itself says."""
    errors = [report.error] if report.error else []
    output_lost = None
    try:
        print_page(report, [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()], Console(file=sys.stdout))
    except UserError as error:
        errors.append(str(error))
    except OutputLostError as error:
        if error.reader_left:
            output_lost = error
        else:
            errors.append(str(error))
    if json_file:
        try:
            write_json(dataclasses.asdict(report), json_file)
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError(" ".join(errors))
    if output_lost:
        raise output_lost
