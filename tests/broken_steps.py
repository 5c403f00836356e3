"""A model whose loss is NaN for some rows, the rows, and the guards' report."""

import json
import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.loop.output_dir import SUSPECTS

_POISON = "Z"


def poison(tiny_model: Path, folder: Path) -> Path:
    """Write to `folder` a model whose loss is NaN for texts with the letter Z."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(_POISON)] = torch.nan
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(path: Path, bad: set[int]) -> Path:
    """Write 12 rows; those whose indices are in `bad` have the letter Z."""
    rng = random.Random(5)
    with path.open("w", encoding="utf-8") as lines:
        for number in range(12):
            text = "".join(rng.choice("abcdefgh ") for _ in range(40))
            question = {"role": "user", "content": text + _POISON * (number in bad)}
            lines.write(json.dumps({"messages": [question, {"role": "assistant", "content": text}]}) + "\n")
    return path


def suspects(run: Path) -> list[dict]:
    """Return the lines that the guards of a run wrote."""
    return [json.loads(line) for line in (run / SUSPECTS).read_text(encoding="utf-8").splitlines()]
