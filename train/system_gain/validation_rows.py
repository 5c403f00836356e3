"""The validation rows that system gain is measured on in training: found once, and kept on disk with their messages."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
from transformers import PreTrainedTokenizerBase

from train.data.cache import cache_key, get_or_build
from train.data.prepared_data import PreparedData
from train.data.sources.formats import Conversation
from train.data.tokens.source import cache_folder
from train.data.tokens.workers import RowTokenizer
from train.formatting import format_count
from train.progress import progress_bar
from train.recipe import Recipe
from train.recipe.conflicts import is_gain_metric
from train.system_gain.variants import (
    Chosen,
    LabelledConversation,
    VariantRows,
    choose,
    encode,
    read_labelled_conversations,
)

_FILE = "rows.json"


def load_gain_rows(recipe: Recipe, data: PreparedData, tokenizer: PreTrainedTokenizerBase) -> VariantRows | None:
    """Rows of the validation data under their own system message, under others and under none; None without any.

    The sources are read for them once; other processes and later starts find the texts in the cache. The tokenizer
    holds the template with its generation marks. Raises UserError where the cache can't be written.
    """
    if data.validation is None or not recipe.system_gain.rows:
        return None
    sequences = data.validation.dataset
    places = sorted({place for sequence in range(len(sequences)) for place in sequences.places(sequence)})
    settings = recipe.system_gain
    key = cache_key(
        {
            "gain rows of": [source.key for source in data.caches],
            "places": xxhash.xxh3_128("\n".join(places).encode()).hexdigest(),
            "numbers": [settings.rows, settings.others, recipe.seed],
        }
    )

    def build(folder: Path) -> dict[str, Any]:
        made = VariantRows([])
        section = recipe.data
        share = isinstance(section.validation, float)
        sources = section.sources if share else section.validation
        rows = read_labelled_conversations(sources, places=frozenset(places), allow_pickle=section.allow_pickle)  # type: ignore[arg-type]
        chosen = choose(rows, made, others=settings.others, limit=settings.rows, seed=recipe.seed)
        texts = [_as_json(one) for one in chosen]
        (folder / _FILE).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        return {"rows": len(chosen), "left_out": made.left_out, "examples": made.examples}

    with progress_bar("choosing rows for system gain", unit="rows") as choosing:
        entry = get_or_build(cache_folder(recipe), key, build, choosing)
    made = VariantRows([], Counter(entry.facts["left_out"]), dict(entry.facts["examples"]))
    kept = json.loads((entry.folder / _FILE).read_text(encoding="utf-8"))
    rows = RowTokenizer(tokenizer, recipe.chat.train_on, recipe.chat.control_tokens_in_text)
    encode([_from_json(one) for one in kept], rows, made, max_length=recipe.data.max_length)
    return made


def describe_gain(made: VariantRows | None) -> str | None:
    """What is measured, in words; None where there is nothing to measure on or it wasn't asked for."""
    if made is None:
        return None
    if not made.rows:
        return f"not measured: {_why_not(made)}"
    siblings = sum(row.siblings for row in made.rows)
    whose = "other messages of the same instruction" if siblings else "other rows' messages"
    if 0 < siblings < len(made.rows):
        whose += f" (where there is none, {len(made.rows) - siblings:,}, other rows')"
    return f"measured at each evaluation on {format_count(len(made.rows), 'validation row')}, against {whose}"


def gain_metric_error(recipe: Recipe, made: VariantRows | None) -> str | None:
    """Why the best checkpoint can't be found as the recipe asks, or None."""
    metric = recipe.training.get("metric_for_best_model")
    if not is_gain_metric(metric) or (made is not None and made.rows):
        return None
    why = "system_gain.rows is 0" if made is None else _why_not(made)
    return f"training.metric_for_best_model: {metric} can't be measured: {why}. Write eval_loss, or mend that."


def _why_not(made: VariantRows) -> str:
    return "; ".join(f"{kind} ({format_count(count, 'row')})" for kind, count in made.left_out.items()) or "no row"


def _as_json(chosen: Chosen) -> dict[str, Any]:
    conversation = chosen.row.conversation
    return {
        "messages": conversation.messages,
        "tools": conversation.tools,
        "template_kwargs": conversation.template_kwargs,
        "place": conversation.place,
        "labels": chosen.row.labels,
        "instruction": chosen.instruction,
        "others": chosen.others,
        "siblings": chosen.siblings,
    }


def _from_json(kept: dict[str, Any]) -> Chosen:
    conversation = Conversation(kept["messages"], kept["tools"], kept["place"], kept["template_kwargs"])
    labels = tuple((of, value) for of, value in kept["labels"])
    return Chosen(LabelledConversation(conversation, labels), kept["instruction"], kept["others"], kept["siblings"])
