"""Run fingerprint: the settings and the data that decide what a run computes, and how two fingerprints differ.

A fingerprint maps dotted keys of the recipe to their values as JSON. Keys that start with `made.` describe what became
of the data: tokens, rows, packed sequences, template.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.recipe import Recipe
from train.recipe.measurements import measured_by
from train.recipe.schedule import BATCH_KEYS
from train.recipe.sft_config import training_fields

if TYPE_CHECKING:  # importing them takes seconds
    from transformers import PreTrainedTokenizerBase

    from train.data.prepared_data import PreparedData

_UNORDERED = {"adapter.target_modules", "adapter.modules_to_save"}
"""Keys whose lists are equal in any order."""
DATA_KEYS = {"data.sources", "data.validation"}
"""Keys whose paths don't matter if the tokens of their rows are recorded."""
_PERMISSIONS = {"model.allow_16bit_training"}
"""Keys that only allow a run to start."""
RESUMABLE_CHANGES = {
    "data.cache_dir",
    "data.processes",
    "evaluation.batch_size",
    "evaluation.shown",
    "model.attention",
    "model.use_kernels",
    "made.template",
    *(
        f"training.{name}"
        for name in (
            *("logging_steps", "logging_first_step", "logging_strategy", "log_level", "run_name", "project"),
            *("save_steps", "save_strategy", "save_total_limit", "eval_steps", "eval_strategy", "eval_on_start"),
            *("per_device_eval_batch_size", "eval_accumulation_steps", "gradient_checkpointing"),
            *("gradient_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps", "ddp_timeout"),
            *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
            *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_pin_memory"),
            *("dataloader_persistent_workers", "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo"),
        )
    ),
}
"""Keys that may change in the middle of a run: what is computed stays the same up to rounding."""


def run_fingerprint(recipe: Recipe) -> dict[str, Any]:
    """Return the dotted keys of the recipe that decide what a run computes, with their values as JSON."""
    others = dict.fromkeys(("output_dir", "tracking", "guards", "save"), True)
    sections = recipe.model_dump(mode="json", exclude={**others, "model": {"sequence_parallel"}})
    flat: dict[str, Any] = {}
    for section, values in sections.items():
        for key, value in values.items() if isinstance(values, dict) else [("", values)]:
            flat[f"{section}.{key}".rstrip(".")] = value
    return {key: value for key, value in flat.items() if key not in (*BATCH_KEYS, *_PERMISSIONS)}


def data_fingerprint(data: "PreparedData", tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """Return the `made.` keys of a run: tokens of each source, chosen rows, packing, template and date."""
    import xxhash

    from train.data.chat.template import date_of

    plan = data.train.dataset.plan_of(0)
    splits = [split.dataset.digest() for split in (data.train, data.validation) if split]
    day = date_of(tokenizer)
    return {
        "made.tokens": [{"source": cache.source, **cache.tokens} for cache in data.caches],
        "made.rows": xxhash.xxh3_128("".join(splits).encode()).hexdigest(),
        "made.sequences": xxhash.xxh3_128(plan.rows.tobytes() + plan.ends.tobytes()).hexdigest(),
        "made.template": xxhash.xxh3_128(str(tokenizer.chat_template).encode()).hexdigest(),
        **({"made.date": day.isoformat()} if day else {}),
    }


def samples_fingerprint(recipe: Recipe) -> dict[str, str]:
    """Return the `made.` key of the file whose rows select the best model; empty where none does."""
    import xxhash

    kind = measured_by(recipe.training.get("metric_for_best_model"))
    path = getattr(getattr(recipe.evaluation, kind or "", None), "path", None)
    return {"made.samples": xxhash.xxh3_128(Path(path).read_bytes()).hexdigest()} if path else {}


def get_value(fingerprint: Mapping[str, Any], key: str) -> Any:
    """Return the value of a key, or TRL's default if the recipe leaves it out."""
    field = training_fields().get(key.removeprefix("training."))
    return fingerprint.get(key, field.default if field else None)


def records_tokens(fingerprint: Mapping[str, Any]) -> bool:
    """Return whether the tokens of the rows are recorded. Earlier versions recorded names of caches."""
    return "made.rows" in fingerprint


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the keys that differ between two runs, also those that may change.

    `made.` keys are compared if both runs have them. If `before` records the tokens of its rows, they are compared
    with the weights of the sources, in place of paths and file names: the same rows in other files are no change.
    """
    keys = {key for key in before.keys() | now.keys() if not key.startswith("made.") or (key in before and key in now)}
    if not records_tokens(before):
        keys -= {"made.tokens"}  # names of caches there, which also changed with our code
    elif _weights(before) == _weights(now):
        keys -= DATA_KEYS
    return sorted(key for key in keys if _comparable(before, key) != _comparable(now, key))


def format_change(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> tuple[str, str]:
    """Return the old and the new value of a key as text."""
    old_value, new_value = get_value(before, key), get_value(now, key)
    if key != "made.tokens":
        if key.startswith("made."):
            return old_value[:8], new_value[:8]
        return json.dumps(old_value, ensure_ascii=False), json.dumps(new_value, ensure_ascii=False)
    if len(old_value) != len(new_value):
        return f"{len(old_value)} sources", f"{len(new_value)} sources"
    pairs = [(old, new) for old, new in zip(old_value, new_value, strict=True) if old["digest"] != new["digest"]]
    texts = [(_format_counts(old), _format_counts(new)) for old, new in pairs]
    return (
        ", ".join(f"{old} in {pair[0]['source']}" for pair, (old, _) in zip(pairs, texts, strict=True)),
        ", ".join("the same number of others" if old == new else new for old, new in texts),
    )


def _weights(fingerprint: Mapping[str, Any]) -> list[Any]:
    """Return the weights of each source, and the validation share."""
    sections = (fingerprint.get(key) for key in sorted(DATA_KEYS))
    return [
        [(source["weight"], source.get("loss_weight", 1.0)) for source in part] if isinstance(part, list) else part
        for part in sections
    ]


def _comparable(fingerprint: Mapping[str, Any], key: str) -> Any:
    value = get_value(fingerprint, key)
    if key in _UNORDERED and isinstance(value, list):
        return sorted(value)
    return [{**part, "source": None} for part in value] if key == "made.tokens" else value


def _format_counts(tokens: Mapping[str, Any]) -> str:
    return f"{tokens['rows']:,} rows of {tokens['tokens']:,} tokens ({tokens['trained_tokens']:,} trained)"
