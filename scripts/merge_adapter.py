r"""Merge a LoRA adapter into its base model; the result needs no peft.

    python scripts/merge_adapter.py outputs/janus-7b-lora \
        --output outputs/janus-7b-merged

Weights are merged file by file, so memory holds one file of the base, not the complete model. Then the result is
verified:

1. Each merged weight must equal base plus update, computed a second way, up to the rounding of its type; all other
   weights must be those of the base, or of the adapter where it has complete ones. The share of the update that
   survives rounding is printed: less than half is an error (--dtype float32 keeps all of it), less than 95 % a warning.
2. Base with adapter and merged model get the same prompts, in float32 and one after the other (4 bytes of main memory
   per parameter): their logits may differ by at most --tolerance, a share of the change by the adapter. --no-compare
   skips this step.

If a step fails, the exit code is 2 and no output is written.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from train.cli import CommandLine, exit_with, run_command
from train.errors import UserError
from train.storage.local_paths import parse_path_or_id

if TYPE_CHECKING:
    import torch

PROMPTS = (
    "Explain why the sky is blue.",
    "You answer in French alone.\n\nWhat is the capital of Norway?",
    "Write a function that reverses a list.",
)
TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.5}
"""Largest difference of a logit, as a share of the largest change by the adapter, by type of the weights: the effect of
rounding (relative error up to 2**-24, 2**-11 or 2**-8) on a well-trained adapter."""
NOISE = 1e-5
"""Share of the largest logit by which two float32 forward passes of one model may differ."""
SURVIVING = {"error": 0.5, "warning": 0.95}
"""Share of the update that must survive rounding to the type of the merged weights."""


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="adapter saved by train/sft.py or peft")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder for the merged model")
    parser.add_argument(
        "--base",
        type=parse_path_or_id,
        metavar="DIR|ID",
        help="base model (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="largest difference of a logit, as a share of the largest change by the adapter (default: 0.01 for "
        "float32, 0.1 for float16, 0.5 for bfloat16 weights)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the merged weights (default: the base's); float32 keeps updates that bfloat16 rounds away",
    )
    parser.add_argument(
        "--no-compare", action="store_true", help="skip the comparison of logits, which loads the models"
    )
    return parser.parse_args(arguments)


def find_base(adapter: Path, base: str | None) -> Path:
    """Return the folder of the base model, downloaded from the hub if necessary. Raises UserError if it is missing."""
    if not adapter.is_dir():
        raise UserError(f"{adapter}: there is no such folder. Write the folder of an adapter.")
    try:
        settings = json.loads((adapter / "adapter_config.json").read_bytes())
    except FileNotFoundError as error:
        checkpoints = sorted(path.parent.name for path in adapter.glob("checkpoint-*/adapter_config.json"))
        hint = f" A stopped run has its adapter in a checkpoint: {', '.join(checkpoints)}." if checkpoints else ""
        raise UserError(f"{adapter}: there is no adapter_config.json, so it holds no adapter.{hint}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{adapter}: has no readable adapter_config.json: {error}") from error
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: the adapter doesn't name its base model. Give it with --base.")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
        revision = None if base else settings.get("revision")
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        raise UserError(f"--base {name}: not a folder, and not available from the hub: {error}") from error


def warn_about_quantization(adapter: Path) -> None:
    """Print a warning if the adapter was trained on 4-bit weights, because it also compensates for their rounding."""
    recipe = adapter / "recipe.yaml"
    if recipe.is_file() and (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("quantization"):
        print(
            "warning: this adapter was trained on the 4-bit base and is merged into the unquantized one. It was fitted "
            "to the rounded weights, so the answers will differ slightly from those in training: evaluate the merged "
            "model.",
            file=sys.stderr,
        )


def compute_logits(model: Any, tokenizer: Any) -> "torch.Tensor":
    """Return the logits after each token of PROMPTS, float32, shape [tokens, vocabulary]."""
    import torch

    logits = []
    for prompt in PROMPTS:
        text = prompt
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits[0].float())
    return torch.cat(logits)


def verify_weights(base: Path, adapter: Path, merged: Path, dtype: str) -> None:
    """Compare the merged weights with base and adapter, and print the result.

    Raises UserError if a weight is wrong, or if too little of the update survives rounding to `dtype`.
    """
    from train.model.merge import find_tied_embeddings
    from train.model.merge_check import check_merge

    try:
        result = check_merge(base, adapter, merged, find_tied_embeddings(base))
    except UserError as error:
        raise UserError(f"{adapter}: the merged model differs from base and adapter: {error}") from error
    if result.changes_nothing:
        print(
            f"warning: {adapter} changes no weight: all its updates are zero, as before training. The merged model "
            "equals the base.",
            file=sys.stderr,
        )
        return
    share = f"{result.surviving:.1%} of the update survives rounding to {dtype}"
    remedy = "Write it in float32 with `--dtype float32`, or serve base and adapter"
    if result.surviving < SURVIVING["error"]:
        raise UserError(
            f"{adapter}: only {share}, so the merged model would be closer to the base than to the trained model. "
            f"{remedy}."
        )
    print(f"all {len(result.names):,} weights equal base plus update up to rounding; {share}", flush=True)
    if result.surviving < SURVIVING["warning"]:
        print(f"warning: only {share}. {remedy}, if the answers are worse than in training.", file=sys.stderr)


def compare_logits(base: Path, adapter: Path, merged: Path, dtype: str, tolerance: float | None) -> str:
    """Return a sentence on the difference between the logits of the merged model and those of base and adapter.

    Raises UserError if it is greater than `tolerance`.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    share = tolerance if tolerance is not None else TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    expected = compute_logits(model, tokenizer)
    with model.disable_adapter():
        base_logits = compute_logits(model, tokenizer)
    del model
    actual = compute_logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), tokenizer)
    largest = expected.abs().max()
    difference, effect = ((other - expected).abs().max() / largest for other in (actual, base_logits))
    allowed = max(share * float(effect), NOISE)
    text = (
        f"largest difference of a logit: {difference:.2e} of the largest logit ({allowed:.0e} allowed for {dtype}); "
        f"the adapter changes logits by {effect:.2e}"
    )
    if not difference <= allowed:  # also true for NaN
        raise UserError(
            f"{adapter}: the merged model differs from base and adapter: {text}. If the cause is rounding, "
            "`--dtype float32` helps."
        )
    if effect < 10 * NOISE:
        text += ", too little to be seen in logits: only the comparison of weights above counts"
    return text


def merge(options: argparse.Namespace) -> None:
    """Merge, verify, and then rename the folder to its final name. Raises UserError."""
    if options.output.exists():
        raise UserError(f"--output {options.output}: exists already. Give a new folder.")
    base = find_base(options.adapter, options.base)
    warn_about_quantization(options.adapter)
    from transformers import AutoConfig

    from train.model.load import disable_bars_in_logs
    from train.model.merge import merge_adapter

    disable_bars_in_logs()
    unfinished = options.output.with_name(f"{options.output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        count = merge_adapter(base, options.adapter, unfinished, options.dtype)
        print(f"{count:,} weights of {base} merged", flush=True)
        dtype = options.dtype or str(AutoConfig.from_pretrained(base).dtype).removeprefix("torch.")
        verify_weights(base, options.adapter, unfinished, dtype)
        if not options.no_compare:
            print(compare_logits(base, options.adapter, unfinished, dtype, options.tolerance), flush=True)
        unfinished.rename(options.output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"the merged model is in {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse_options(arguments)
    return run_command(lambda: merge(options), "stopped; start the same command again")


if __name__ == "__main__":
    exit_with(main)
