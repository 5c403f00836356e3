"""Inputs of `benchmark.py train`: the device, a model folder with random weights, rows, and the planned memory.

Speed depends on the lengths of rows, not on their text: rows are random letters, and the tokenizer has one token per
letter. Lengths are those of Multifaceted Collection in tokens of Mistral's tokenizer.
"""

import json
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.rows import lengths
from benchmarks.training_contenders import KERNELS, Workload
from train.data.chat.template import use_template
from train.errors import UserError
from train.model.attention.selection import AttentionChoice, select_attention
from train.model.flops import peak_flops
from train.model.load import disable_bars_in_logs
from train.preflight.plan.candidates import Candidates
from train.preflight.plan.cluster import Cluster
from train.preflight.plan.memory import DDP
from train.preflight.plan.settings import written_settings
from train.recipe import Recipe

CHARACTERS_PER_TOKEN = 4.03
"""Of Mistral's tokenizer (v1), in 400 rows of rows.py: 4.03 in system messages, 4.05 in questions, 4.03 in answers."""
PROMPT_TOKENS = 17
"""Added by mistral-system to a prompt, in tokens of one letter: <s>, `[INST] `, a line break, ` [/INST]`."""
ANSWER_TOKENS = 2
"""Added by mistral-system to an answer: a space and </s>."""


def model_config(workload: Workload) -> PreTrainedConfig:
    """Return a new config of the model."""
    return AutoConfig.for_model(**workload.config)


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


def write_model(workload: Workload, folder: Path) -> None:
    """Write a model folder: random bfloat16 weights of the seed, and a tokenizer with one token per byte."""
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
    disable_bars_in_logs()
    torch.manual_seed(workload.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(model_config(workload), dtype=torch.bfloat16)
    model.save_pretrained(folder)


def probe_device(workload: Workload, recipe: Recipe) -> dict[str, Any]:
    """Return name, memory and peak FLOP/s of the device, and for each attention kernel why it can't be used (or None).

    Raises UserError for accelerators other than CUDA and ROCm GPUs.
    """

    def select(kernel: str) -> AttentionChoice:
        model = recipe.model.model_copy(update={"attention": kernel})
        return select_attention(recipe.model_copy(update={"model": model}), model_config(workload))

    def kernel_error(kernel: str) -> str | None:
        try:
            select(kernel)
        except UserError as error:
            return str(error)
        return None

    device: dict[str, Any] = {"device": "cpu", "memory_bytes": None, "peak_flops": None, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        device |= {"device": gpu.name, "memory_bytes": gpu.total_memory, "peak_flops": peak_flops(gpu.name)}
        device["capability"] = f"{gpu.major}.{gpu.minor}"
    elif torch.accelerator.is_available():
        accelerator = torch.accelerator.current_accelerator()
        raise UserError(f"this benchmark measures on CUDA and ROCm GPUs, or on the CPU; this machine has {accelerator}")
    automatic = select("auto")
    device |= {"automatic": automatic.kernel, "automatic_reasons": automatic.reasons}
    return device | {"kernels": {kernel: kernel_error(kernel) for kernel in KERNELS}}


def plan_memory(recipe: Recipe, workload: Workload, device: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters, and under `foretold` the bytes that `--check --gpus` plans for one GPU, part by part."""
    documents = [sum(row) + PROMPT_TOKENS + ANSWER_TOKENS for row in row_lengths(workload)]
    candidates = Candidates(
        recipe, model_config(workload), recipe.data.max_length if recipe.data.packing else max(documents)
    )
    cluster = Cluster(1, 1, "here", device["memory_bytes"] or 0, 1.0, assumed=False, mfu=1.0)
    memory = vars(candidates.memory(written_settings(recipe, DDP), cluster))
    shape = candidates.shape
    planned = {name: value for name, value in memory.items() if isinstance(value, int) and name != "host"}
    return {"parameters": shape.total, "trained_parameters": shape.trained, "foretold": planned}
