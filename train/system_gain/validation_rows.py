"""The validation rows that system gain is measured on in training, selected once and cached with their messages."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from train.data.cache import cache_key, get_or_build
from train.data.dataset import PackedDataset
from train.data.prepared_data import PreparedData
from train.data.sources.formats import Conversation
from train.data.tokens.source import cache_folder
from train.data.tokens.workers import RowTokenizer
from train.formatting import format_count
from train.progress import progress_bar
from train.recipe import Recipe
from train.recipe.measurements import is_gain_metric
from train.system_gain.variants import (
    SOURCE_LABEL,
    LabelledConversation,
    SelectedRow,
    VariantRows,
    Variants,
    encode_variants,
    read_labelled_conversations,
    select_rows,
)

_FILE = "rows.json"


def load_gain_rows(recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> VariantRows | None:
    """Return rows of the validation data under their own system message, under others and under none.

    None without validation data, or if the recipe measures no rows. The sources are read once; other processes and
    later starts find the texts in the cache. The tokenizer must have the template with its generation marks.
    Raises UserError if the cache can't be written.
    """
    if data.validation is None or not recipe.system_gain.rows:
        return None
    source_of = _find_sources(data.validation.dataset)
    places = sorted(source_of)
    settings = recipe.system_gain
    key = cache_key(
        {
            "gain rows of": [source.key for source in data.caches],
            "places": xxhash.xxh3_128("\n".join(places).encode()).hexdigest(),
            "numbers": [settings.rows, settings.others, recipe.seed],
        }
    )

    def build(folder: Path) -> dict[str, Any]:
        variants = VariantRows([])
        section = recipe.data
        sources = section.validation if isinstance(section.validation, tuple) else section.sources
        rows = read_labelled_conversations(
            sources, places=frozenset(places), allow_pickle=section.allow_pickle, in_pairs=bool(recipe.preference)
        )
        selected = select_rows(rows, variants, others=settings.others, limit=settings.rows, seed=recipe.seed)
        texts = json.dumps([_to_json(row) for row in selected], ensure_ascii=False)
        (folder / _FILE).write_text(texts, encoding="utf-8")
        return {"rows": len(selected), "left_out": variants.dropped, "examples": variants.examples}

    with progress_bar("choosing rows for system gain", unit="rows") as bar:
        entry = get_or_build(cache_folder(recipe), key, build, bar)
    variants = VariantRows([], Counter(entry.facts["left_out"]), dict(entry.facts["examples"]))
    selected = [_from_json(row) for row in json.loads((entry.folder / _FILE).read_text(encoding="utf-8"))]
    row_tokenizer = RowTokenizer(tokenizer, recipe.chat.train_on, recipe.chat.control_tokens_in_text)
    encode_variants(selected, row_tokenizer, variants, max_length=recipe.data.max_length)
    if len(data.validation.dataset.rows_by_source) > 1:
        variants.rows[:] = [_label_source(row, source_of[row.place]) for row in variants.rows]
    return variants


def _find_sources(sequences: PackedDataset) -> dict[str, str]:
    """Return the place of each row -> the name of its source."""
    names = [*sequences.rows_by_source]
    return {
        place: names[source]
        for sequence in range(len(sequences))
        for place, source in zip(sequences.places(sequence), sequences.sources(sequence), strict=True)
    }


def _label_source(row: Variants, name: str) -> Variants:
    """Return a row with the short name of its source as a label, in place of the path."""
    others = (label for label in row.labels if label[0] != SOURCE_LABEL)
    return replace(row, labels=((SOURCE_LABEL, name), *others))


def describe_gain(variants: VariantRows | None) -> str | None:
    """Return a sentence on the rows that are measured; None if the recipe measures none."""
    if variants is None:
        return None
    if not variants.rows:
        return f"not measured: {_drop_reasons(variants)}"
    siblings = sum(row.siblings for row in variants.rows)
    others = "other messages of the same instruction" if siblings else "other rows' messages"
    if 0 < siblings < len(variants.rows):
        others += f" (where there is none, {len(variants.rows) - siblings:,}, other rows')"
    return f"measured at each evaluation on {format_count(len(variants.rows), 'validation row')}, against {others}"


def gain_metric_error(recipe: Recipe, variants: VariantRows | None) -> str | None:
    """Return an error if `metric_for_best_model` is a gain that can't be measured; else None."""
    metric = recipe.training.get("metric_for_best_model")
    if not is_gain_metric(metric) or (variants is not None and variants.rows):
        return None
    reason = "system_gain.rows is 0" if variants is None else _drop_reasons(variants)
    return f"training.metric_for_best_model: {metric} can't be measured: {reason}. Write eval_loss, or correct that."


def _drop_reasons(variants: VariantRows) -> str:
    return "; ".join(f"{kind} ({format_count(count, 'row')})" for kind, count in variants.dropped.items()) or "no row"


def _to_json(selected: SelectedRow) -> dict[str, Any]:
    conversation = selected.row.conversation
    return {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "template_kwargs": conversation.template_kwargs,
        "place": conversation.place,
        "labels": selected.row.labels,
        "instruction": selected.instruction,
        "others": selected.others,
        "siblings": selected.siblings,
    }


def _from_json(row: dict[str, Any]) -> SelectedRow:
    conversation = Conversation(row["messages"], row["tools"], row["place"], row["template_kwargs"])
    labels = tuple((name, value) for name, value in row["labels"])
    return SelectedRow(LabelledConversation(conversation, labels), row["instruction"], row["others"], row["siblings"])
