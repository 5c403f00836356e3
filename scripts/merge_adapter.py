r"""Merge a LoRA adapter into its base model: what comes out needs no peft.

    python scripts/merge_adapter.py outputs/janus-7b-lora \
        --output outputs/janus-7b-merged

Weights are merged file by file, so memory holds one file of the base, not the model. Then the result is proved:

1. Each weight must be base plus update, worked out a second way, up to the rounding of its type; all others must be the
   base's, or the adapter's where it brings whole ones. The share of the update that survives rounding is printed: less
   than half is an error (--dtype float32 keeps all of it), less than 95 % a warning.
2. Both are asked the same prompts, base with adapter and merged model, in float32 and one after the other (4 bytes a
   parameter of main memory): their logits may differ by no more than --tolerance, a share of what the adapter itself
   changes. --no-compare leaves that out.

Exit code 2, and no output, where one of them fails.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from train.cli import CommandLine, run_command
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
"""Largest difference of a logit, as a share of the largest change that the adapter makes: what it costs a well-trained
adapter that merged weights are rounded, by up to 2**-24, 2**-11 or 2**-8 of themselves."""
NOISE = 1e-5
"""Share of the largest logit by which two float32 forward passes of one model may differ: logits show no less."""
SURVIVING = {"error": 0.5, "warning": 0.95}
"""Share of the update below which rounding to the merged weights' type is an error, or a warning."""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="what train/sft.py saved, or peft")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder for the merged model")
    parser.add_argument(
        "--base",
        type=parse_path_or_id,
        metavar="DIR|ID",
        help="the base model (default: the one that the adapter names)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="largest difference of a logit, as a share of the largest change that the adapter makes to one (default: "
        "0.01 for weights in float32, 0.1 in float16, 0.5 in bfloat16)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="type of the merged weights (default: the base's); float32 keeps updates that bfloat16 would round away",
    )
    parser.add_argument("--no-compare", action="store_true", help="don't load the models to compare their logits")
    return parser.parse_args(arguments)


def find_base(adapter: Path, base: str | None) -> Path:
    """The folder of the base model, fetched from the hub if need be. Raises UserError where there is none."""
    try:
        settings = json.loads((adapter / "adapter_config.json").read_bytes())
    except (OSError, ValueError) as fault:
        raise UserError(f"{adapter}: holds no adapter_config.json that can be read: {fault}") from fault
    name = base or settings.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{adapter}: the adapter doesn't name its base. Name it with --base.")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]
        revision = None if base else settings.get("revision")
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as fault:
        raise UserError(f"--base {name}: no folder, and not to be had from the hub: {fault}") from fault


def warn_of_quantization(adapter: Path) -> None:
    """One line where the adapter was trained over 4-bit weights, whose rounding it has learnt to make up for."""
    recipe = adapter / "recipe.yaml"
    if recipe.is_file() and (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("quantization"):
        print(
            "warning: this adapter was trained over the base in 4 bits and is merged into the base as it is. It was "
            "fitted to the rounded weights, so its answers will differ a little from those in training: evaluate the "
            "merged model.",
            file=sys.stderr,
        )


def logits(model: Any, tokenizer: Any) -> "torch.Tensor":
    """Logits after each token of `PROMPTS`, float32 [tokens, vocabulary]."""
    import torch

    found = []
    for prompt in PROMPTS:
        text = prompt
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
        with torch.inference_mode():
            found.append(model(input_ids=ids).logits[0].float())
    return torch.cat(found)


def prove(base: Path, adapter: Path, merged: Path, dtype: str) -> None:
    """Compare the merged weights with base and adapter; say what was found.

    Raises UserError where one is wrong, or where rounding to `dtype` leaves too little of the update.
    """
    from train.model.merge import tied_embeddings
    from train.model.merge_check import check_merge

    try:
        found = check_merge(base, adapter, merged, tied_embeddings(base))
    except UserError as fault:
        raise UserError(f"{adapter}: merged, the model answers otherwise than base and adapter: {fault}") from fault
    if found.changes_nothing:
        print(
            f"warning: {adapter} changes no weight: all its updates are zero, as before training. The merged model is "
            "the base.",
            file=sys.stderr,
        )
        return
    share = f"{found.surviving:.1%} of the update survives rounding to {dtype}"
    way_out = "Write it in float32 with `--dtype float32`, or serve base and adapter"
    if found.surviving < SURVIVING["error"]:
        raise UserError(
            f"{adapter}: only {share}, so the merged model would be closer to the base than to what was trained. "
            f"{way_out}."
        )
    print(f"each of {len(found.names):,} weights is base plus update up to rounding; {share}", flush=True)
    if found.surviving < SURVIVING["warning"]:
        print(f"warning: only {share}. {way_out}, if the answers are not as good as in training.", file=sys.stderr)


def compare(base: Path, adapter: Path, merged: Path, dtype: str, tolerance: float | None) -> str:
    """How far the merged model's logits are from those of base and adapter. Raises UserError above `tolerance`."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    share = tolerance if tolerance is not None else TOLERANCE.get(dtype, TOLERANCE["bfloat16"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
    before = logits(model, tokenizer)
    with model.disable_adapter():
        without = logits(model, tokenizer)
    del model
    after = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval(), tokenizer)
    largest = before.abs().max()
    difference, effect = ((other - before).abs().max() / largest for other in (after, without))
    allowed = max(share * float(effect), NOISE)
    found = (
        f"largest difference of a logit: {difference:.2e} of the largest logit ({allowed:.0e} allowed for {dtype}); "
        f"the adapter itself makes {effect:.2e}"
    )
    if not difference <= allowed:  # nor NaN
        raise UserError(
            f"{adapter}: merged, the model answers otherwise than base and adapter: {found}. If it is rounding, "
            "`--dtype float32` helps."
        )
    if effect < 10 * NOISE:
        found += ", too little for logits to show: the weights above are the proof"
    return found


def merge(options: argparse.Namespace) -> None:
    """Merge, compare, and only then give the folder its name. Raises UserError for all that the user can mend."""
    if options.output.exists():
        raise UserError(f"--output {options.output}: exists already. Name a new folder.")
    base = find_base(options.adapter, options.base)
    warn_of_quantization(options.adapter)
    from transformers import AutoConfig

    from train.model.load import hide_bars_in_logs
    from train.model.merge import merge_adapter

    hide_bars_in_logs()
    unfinished = options.output.with_name(f"{options.output.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        count = merge_adapter(base, options.adapter, unfinished, options.dtype)
        print(f"{count:,} weights of {base} merged", flush=True)
        dtype = options.dtype or str(AutoConfig.from_pretrained(base).dtype).removeprefix("torch.")
        prove(base, options.adapter, unfinished, dtype)
        if not options.no_compare:
            print(compare(base, options.adapter, unfinished, dtype, options.tolerance), flush=True)
        unfinished.rename(options.output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"the merged model is in {options.output}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit code."""
    options = parse(arguments)
    return run_command(lambda: merge(options), "stopped; start the same command again")


if __name__ == "__main__":
    sys.exit(main())
