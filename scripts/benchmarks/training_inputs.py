"""Inputs of `benchmark.py train`: the model's config, rows, a tokenizer, and a recipe for each setting.

Speed depends on the lengths of rows, not on their text: rows are random letters, and the tokenizer has one token per
letter. Lengths are those of Multifaceted Collection in tokens of Mistral's tokenizer.
"""

import json
import random
import string
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    __version__,
)

from benchmarks.rows import lengths
from benchmarks.training_settings import Setting
from train.data.chat.template import use_template
from train.errors import UserError
from train.preflight.plan.activations import ActivationTracer
from train.preflight.plan.candidates import Candidates
from train.preflight.plan.cluster import Cluster
from train.preflight.plan.memory import DDP
from train.preflight.plan.settings import written_settings
from train.recipe import Recipe
from train.recipe.optimizer_arguments import missing_package

CHARACTERS_PER_TOKEN = 4.03
"""Of Mistral's tokenizer (v1), in 400 rows of rows.py: 4.03 in system messages, 4.05 in questions, 4.03 in answers."""
PROMPT_TOKENS = 17
"""Added by mistral-system to a prompt, in tokens of one letter: <s>, `[INST] `, a line break, ` [/INST]`."""
ANSWER_TOKENS = 2
"""Added by mistral-system to an answer: a space and </s>."""
OTHER_OPTIMIZER = "adamw_torch_fused"
_SHARES = (1.0, 0.75, 0.5, 0.25, 0.125)

_MISTRAL: dict[str, Any] = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "sliding_window": None,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": False,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    # https://huggingface.co/mistral-community/Mistral-7B-v0.2/blob/main/config.json
    "mistral-7b-v0.2": {
        **_MISTRAL,
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
    },
    "mistral-74m": {  # checkpoints of 0.9 GB with AdamW's states in float32
        **_MISTRAL,
        "hidden_size": 512,
        "intermediate_size": 1_536,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
    "tiny": {  # a dry run on a CPU
        **_MISTRAL,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


@dataclass(frozen=True)
class Workload:
    """Steps that all settings train: Janus-like rows packed at `max_length`; `warmup` steps are not timed."""

    config: dict[str, Any]
    rows: int
    max_length: int
    warmup: int
    steps: int
    seed: int


def load_workload(config: str, rows: int, max_length: int, warmup: int, steps: int, seed: int) -> Workload:
    """Return the workload. Raises UserError for a config that can't be read or built, and if all rows are too long."""
    workload = Workload(load_model_config(config), rows, max_length, warmup, steps, seed)
    if workload.config["model_type"] not in CONFIG_MAPPING:
        kind = workload.config["model_type"]
        raise UserError(f"--config: {config} is a model of type {kind!r}, which transformers {__version__} lacks.")
    if not any(row_lengths(workload)):
        shortest = min(map(sum, row_lengths(replace(workload, max_length=sys.maxsize)))) + PROMPT_TOKENS + ANSWER_TOKENS
        raise UserError(f"--max-length: {max_length:,} is shorter than every row. Write {shortest} or more.")
    return workload


def load_model_config(name: str) -> dict[str, Any]:
    """Return the config with a name of CONFIGS, or in a model's config.json. Raises UserError if it can't be read."""
    if name in CONFIGS:
        return dict(CONFIGS[name])
    try:
        config = json.loads(Path(name).read_bytes())
        if "model_type" not in config:
            raise ValueError("it has no model_type")
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"--config: {name} is no config: {reason}. Name a model's config.json, or one of {', '.join(CONFIGS)}."
        ) from error
    return {key: value for key, value in config.items() if not key.startswith("_")}


def model_config(workload: Workload, layers: int | None = None) -> PreTrainedConfig:
    """Return a new config of the model, with another number of layers if `layers` is given."""
    config = AutoConfig.for_model(**workload.config)
    if layers is not None:
        text = config.get_text_config()
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:layers]
    return config


def row_lengths(workload: Workload) -> Iterator[tuple[int, int, int]]:
    """Yield the letters of system message, question and answer of each row that fits into `max_length` tokens."""
    rng = random.Random(workload.seed)
    for _ in range(workload.rows):
        system, user, answer = (round(characters / CHARACTERS_PER_TOKEN) for characters in lengths(rng).values())
        if system + user + answer + PROMPT_TOKENS + ANSWER_TOKENS <= workload.max_length:
            yield system, user, answer


def write_rows(workload: Workload, file: Path) -> None:
    """Write conversations of random letters in those lengths."""
    rng = random.Random(workload.seed)
    with file.open("w", encoding="utf-8") as lines:
        for row in row_lengths(workload):
            messages = [
                {"role": role, "content": "".join(rng.choices(string.ascii_letters, k=letters))}
                for role, letters in zip(("system", "user", "assistant"), row, strict=True)
            ]
            lines.write(json.dumps({"messages": messages}) + "\n")


def write_model(folder: Path, config: Mapping[str, Any], seed: int) -> None:
    """Write a model with random weights, and its tokenizer."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**config)).save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token per byte, and the template of the recipes."""
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )
    use_template(tokenizer, "mistral-system")
    tokenizer.save_pretrained(folder)


def setting_recipe(setting: Setting, workload: Workload, folder: Path, *, on_cpu: bool) -> Recipe:
    """Return the setting's recipe with the rows and steps of the workload; its run writes into `folder`.

    - 16-bit weights are trained in full, as each GPU computes under ZeRO, where float32 copies are spread over GPUs.
    - On a CPU torch.compile generates no code: there it is a dry run.
    """
    overrides = [
        "model.allow_16bit_training=true",
        f"model.name_or_path={json.dumps(str(folder / 'model'))}",
        f"data.sources={json.dumps([{'path': str(folder / 'rows.jsonl')}])}",
        f"data.cache_dir={json.dumps(str(folder / 'cache'))}",
        f"data.max_length={workload.max_length}",
        "data.validation=null",
        "training.gradient_accumulation_steps=1",
        f"training.max_steps={workload.warmup + workload.steps}",
        "training.logging_steps=1",
        "training.eval_strategy='no'",
        "training.save_strategy='no'",
        "tracking.wandb=null",
        f"output_dir={json.dumps(str(folder / 'run'))}",
        f"seed={workload.seed}",
    ]
    overrides += optimizer_overrides(setting)
    if on_cpu and setting.changes.get("compile") == "on":
        overrides.append("training.torch_compile_backend=eager")
    return setting.load_recipe(overrides)


def optimizer_overrides(setting: Setting) -> list[str]:
    """Return the override of the recipe's optimizer, unless its package is installed or the setting names another."""
    if "optim" in setting.changes or not missing_package(setting.load_recipe([]).training["optim"]):
        return []
    return [f"training.optim={OTHER_OPTIMIZER}"]


def planned_bytes(recipe: Recipe, config: PreTrainedConfig, tracer: ActivationTracer | None = None) -> int | None:
    """Return the peak bytes that `--check --gpus` plans for the recipe on one GPU; None if it can't plan the model.

    `tracer`: of a recipe with the same method and kernel, whose traces are used again.
    """
    cluster = Cluster(1, 1, "here", 0, 1.0, assumed=False, mfu=1.0)
    try:
        candidates = Candidates(recipe, config, recipe.data.max_length, tracer)
        return candidates.memory(written_settings(recipe, DDP), cluster).total
    except UserError:
        return None


def fit_layers(recipe: Recipe, workload: Workload, memory: float) -> int:
    """Return the most layers, of all or a share of them, with which the recipe fits into `memory` bytes by the plan.

    Fewer layers of the same widths keep the shapes of all kernels.
    """
    layers = model_config(workload).get_text_config().num_hidden_layers
    counts = list(dict.fromkeys(max(1, round(layers * share)) for share in _SHARES))
    return next((count for count in counts if (planned_bytes(recipe, model_config(workload, count)) or 0) <= memory), 1)
