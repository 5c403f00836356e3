"""`train/sft.py --init FILE`: a commented minimal recipe for given data, with the statistics behind its values.

python train/sft.py --init my.yaml --model outputs/smollm2-135m-instruct --data rows.jsonl
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from train.data.sources.formats import read_row
from train.data.sources.row_errors import RowError
from train.data.sources.source import chunks_and_format, open_source
from train.data.stats import format_percentiles, percentiles
from train.errors import UserError
from train.formatting import format_count
from train.recipe import ChatSection, DataSection, ModelSection, Recipe, Source, TrainingSource

MODEL, DATA = "path/to/model-or-hub-id", "path/to/rows.jsonl"
"""Placeholders of a recipe without --model or --data; the error of `--check` names them."""
_CHATS: tuple[Mapping[str, str], ...] = ({}, {"template": "chatml"}, {"system_role": "merge_into_user"})
"""Settings of `chat`, the first of which the model's tokenizer takes: its own template, if it keeps system messages."""
_SMALLEST_LENGTH, _DEFAULT_LENGTH = 256, 2_048
_CHARACTERS_PER_TOKEN = 3
"""Fewer than English text has (about 4), so that the estimate of a row's tokens is rather too large."""
_MANY_ROWS = 200
"""Distinct rows from which some are held out for validation and eight sequences make a step."""


@dataclass(frozen=True)
class DataFacts:
    """Statistics of the rows that a recipe is written for. `lengths`: in `unit` (tokens or characters), [rows]."""

    format: str
    rows: int
    turns: int
    with_system: int
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    unit: str = "characters"
    bad_rows: int = 0
    duplicates: int = 0
    ignore: list[str] = field(default_factory=list)
    chat: Mapping[str, str] = field(default_factory=dict)


def write_starter_recipe(file: Path, model: str | None = None, data: str | None = None) -> list[str]:
    """Write a recipe for `model` and `data` to `file`. Return what its user has to know: placeholders, ignored columns.

    Raises UserError if `file` exists or can't be written, and if the data can't be read.
    """
    if file.exists():
        raise UserError(f"--init: {file} exists and is not replaced. Name another file.")
    facts = _read_facts(data) if data else None
    if facts and model:
        facts = _tokenized_facts(facts, model, data or "")
    positions = _positions(model) if model else None
    try:
        file.write_text(_render(file, model or MODEL, data or DATA, facts, positions), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--init: {file} can't be written: {error.strerror}. Name another file.") from error
    notes = [
        f"replace the placeholder {placeholder}"
        for placeholder, given in ((MODEL, model), (DATA, data))
        if given is None
    ]
    if facts and facts.ignore:
        notes.append(f"no format reads {', '.join(facts.ignore)}: `ignore` leaves it out of training")
    return notes


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _read_facts(data: str) -> DataFacts:
    """Return the format and the statistics of the rows of a source, in characters."""
    source = Source(path=data)
    chunks, format = chunks_and_format(source, open_source(source))
    lengths, turns, with_system, bad_rows = [], 0, 0, 0
    for place, row in (located for _, chunk in chunks for located in chunk.rows()):
        try:
            if isinstance(row, RowError):
                raise row
            messages = read_row(row, format, place).messages
        except RowError:
            bad_rows += 1
            continue
        roles = [message["role"] for message in messages]
        turns += len(roles) - roles.count("system")
        with_system += "system" in roles
        lengths.append(sum(len(str(message.get("content") or "")) for message in messages))
    return DataFacts(format, len(lengths), turns, with_system, np.array(lengths, np.int32), bad_rows=bad_rows)


def _tokenized_facts(facts: DataFacts, model: str, data: str) -> DataFacts:
    """Return the statistics with lengths in tokens, under the first chat settings that the tokenizer takes."""
    from train.data.prepare import examine
    from train.model.tokenizer import load_chat_tokenizer

    for chat in _CHATS:
        recipe = Recipe(
            model=ModelSection(name_or_path=model),
            chat=ChatSection.model_validate(chat),
            data=DataSection(sources=(TrainingSource(path=data),), max_length=2**30, on_bad_row="skip", packing=False),
            output_dir="unused",
        )
        try:
            tokenizer = load_chat_tokenizer(recipe.model, recipe.chat).tokenizer
            break
        except UserError:
            if chat is _CHATS[-1]:
                raise
    prepared = examine(recipe, tokenizer)
    stats = prepared.train.stats
    return replace(
        facts,
        lengths=stats.lengths,
        unit="tokens",
        bad_rows=sum(rows.count for rows in prepared.errors.values()),
        duplicates=stats.duplicates.rows,
        ignore=[text.name for text in prepared.unread if text.losing],
        chat=chat,
    )


def _positions(model: str) -> int | None:
    from train.model.load import load_config

    return getattr(load_config(ModelSection(name_or_path=model)).get_text_config(), "max_position_embeddings", None)


def _max_length(facts: DataFacts | None, positions: int | None) -> int:
    """Return the power of two that holds the longest row, but not more than the model's positions."""
    length = _DEFAULT_LENGTH
    if facts and len(facts.lengths):
        longest = int(facts.lengths.max()) / (1 if facts.unit == "tokens" else _CHARACTERS_PER_TOKEN)
        length = max(_SMALLEST_LENGTH, 2 ** math.ceil(math.log2(max(longest, 1))))
    return min(length, positions or length)


def _render(file: Path, model: str, data: str, facts: DataFacts | None, positions: int | None) -> str:
    max_length = _max_length(facts, positions)
    about_data, about_length, many = "a file, a folder, a glob or a data set on the hub", "tokens of a sequence", False
    chat: Mapping[str, str] = {}
    more = ["  packing: true                 # several rows in one sequence; attention keeps them apart"]
    if facts:
        chat, many = facts.chat, facts.rows - facts.duplicates >= _MANY_ROWS
        turns, share = facts.turns / max(facts.rows, 1), facts.with_system / max(facts.rows, 1)
        about_data = (
            f"format {facts.format}: {format_count(facts.rows, 'row')}, {turns:.1f} turns each, {share:.0%} with a "
            "system message"
        )
        shown = {
            percent: size for percent, size in percentiles(facts.lengths).items() if percent in ("50", "95", "100")
        }
        spread = format_percentiles(shown)
        about_length = f"{facts.unit} per row: {spread}" if spread else about_length
        if facts.unit == "tokens" and (longer := int((facts.lengths > max_length).sum())):
            more.append(f"  overlong: drop                # {format_count(longer, 'row')} exceed the model's positions")
        if facts.bad_rows:
            more.append(f"  on_bad_row: skip              # {format_count(facts.bad_rows, 'row')}: --check names them")
    if many:
        more.append("  validation: 0.05              # share of the rows held out for evaluation")
    gpu = _has_gpu()
    launch = "single_gpu.yaml" if gpu else "cpu.yaml"
    # On a CPU bfloat16 weights and recomputed activations are slow, and eight sequences a step give long steps.
    dtype = "" if gpu else "\n  dtype: float32               # for a CPU; bfloat16 on a GPU"
    recompute = "" if gpu else "\n  gradient_checkpointing: false # true saves memory on a GPU"
    template, role = chat.get("template"), chat.get("system_role", "native")
    ignore = f"\n      ignore: {facts.ignore}   # columns that no format reads" if facts and facts.ignore else ""
    return f"""\
# Written by train/sft.py --init. Every key: recipes/README.md. First look at what would be trained, then train:
#   python train/sft.py --recipe {file} --check
#   accelerate launch --config_file accelerate_configs/{launch} train/sft.py --recipe {file}

model:
  name_or_path: {_quote(model)}{dtype}
chat:
  template: {template or "null":<20}# null = the tokenizer's own
  system_role: {role:<17}# native = the template writes system messages
data:
  sources:
    # {about_data}
    - path: {_quote(data)}{ignore}
  # {about_length}
  max_length: {max_length}
{chr(10).join(more)}
adapter:
  r: 16                         # LoRA; for full fine-tuning take the section out, with a lower learning rate and,
                                # on one GPU, model.dtype: float32
training:                       # the fields of TRL's SFTConfig
  num_train_epochs: 2
  per_device_train_batch_size: 1
  gradient_accumulation_steps: {8 if many and gpu else 1}{recompute}
  learning_rate: 2.0e-4
output_dir: {_quote(f"outputs/{file.stem}")}
seed: 42
# Sections left at their defaults: quantization, tracking, save, guards, system_gain, evaluation.
"""


def _quote(text: str) -> str:
    """Return `text` as a YAML scalar on one line."""
    import yaml

    return (
        yaml.safe_dump(text, default_flow_style=True, allow_unicode=True, width=math.inf).removesuffix("...\n").strip()
    )
