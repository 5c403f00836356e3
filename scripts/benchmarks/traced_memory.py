"""Planned activations against a trace of all layers: models x dtype x checkpointing x LoRA.

    python -m scripts.benchmarks.traced_memory tests/model_configs/*.json --tokens 8192

The plan traces a few layers at two lengths and extrapolates; the trace has each layer of the model and the exact
length. Nothing is allocated: the tensors are fake.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from train.errors import UserError

SETTINGS: tuple[dict[str, Any], ...] = (
    {"weights": "bfloat16", "autocast": False, "checkpointing": "full"},
    {"weights": "bfloat16", "autocast": False, "checkpointing": "selective"},
    {"weights": "bfloat16", "autocast": False, "checkpointing": "none"},
    {"weights": "float32", "autocast": True, "checkpointing": "full"},
    {"weights": "float32", "autocast": True, "checkpointing": "none"},
    {"weights": "bfloat16", "autocast": True, "checkpointing": "full", "lora": 64},
    {"weights": "bfloat16", "autocast": True, "checkpointing": "none", "lora": 64},
)
"""Under ZeRO weights are in bfloat16; without it autocast casts those in float32, and LoRA's matrices are float32."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each model and setting: planned and traced GiB, their ratio, seconds of both."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, help="config.json of each model, or a folder that has one")
    parser.add_argument("--tokens", type=int, default=8_192, help="tokens of a micro-batch")
    options = parser.parse_args(arguments)
    print(f"{'model':28} {'setting':32} {'planned':>9} {'traced':>9} {'ratio':>7} {'s':>6} {'s all':>6}")
    for config in options.configs:
        for settings in SETTINGS:
            print(_compare(config, dict(settings), options.tokens), flush=True)
    return 0


def _compare(config: Path, settings: dict[str, Any], tokens: int) -> str:
    from transformers import AutoConfig

    from train.preflight.plan.activations import ActivationTracer
    from train.recipe import AdapterSection
    from train.recipe.schema import ModelSection

    rank = settings.pop("lora", 0)
    recipe: Any = SimpleNamespace(
        model=ModelSection(name_or_path=str(config)),
        data=SimpleNamespace(packing=True),
        adapter=AdapterSection(r=rank, lora_alpha=2 * rank, lora_dropout=0.05) if rank else None,
        quantization=None,
        training={},
    )
    tracer = ActivationTracer(recipe, AutoConfig.from_pretrained(config))
    begin = time.perf_counter()
    try:
        planned = tracer.activations(**settings, tokens=tokens, longest=tokens).peak
        between = time.perf_counter()
        traced = tracer.trace_all_layers(**settings, tokens=tokens).peak
    except UserError as error:
        return f"{config.stem:28} {error}"
    end = time.perf_counter()
    words = [settings["weights"], "autocast" if settings["autocast"] else "", settings["checkpointing"]]
    setting = " ".join(filter(None, [*words, "LoRA" if rank else ""]))
    return (
        f"{config.stem:28} {setting:32} {planned / 2**30:9.3f} {traced / 2**30:9.3f} {planned / traced:7.4f} "
        f"{between - begin:6.1f} {end - between:6.1f}"
    )


if __name__ == "__main__":
    sys.exit(main())
