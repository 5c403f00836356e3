"""Files beside the weights of a saved model: configuration, generation settings, tokenizer, model card.

Before training they are written into a temporary folder, as a test. After the weights are saved, one that can't be
written is a warning. Once the cause is fixed,

    python -m train.loop.side_files OUTPUT_DIR

writes them again, from the recipe in that folder, beside the weights of a finished model.
"""

import copy
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
)

from train.cli import CommandLine, run_command
from train.errors import USER_FIXABLE_ERRNOS, UserError
from train.loop.output_dir import CARD, CARD_MARK, is_foreign_card, unwritable_files
from train.model.adapters import lora_config
from train.model.load import copy_processor, trained_config
from train.model.text_part import build_meta_model, find_idle_parameters
from train.recipe import Recipe

if TYPE_CHECKING:  # importing it takes a second
    from peft import PeftModel

Writers = dict[str, Callable[[Path], object]]
"""For each file, or group of files, the function that writes it into a folder."""


def list_side_files(model: "PreTrainedModel | PeftModel", tokenizer: PreTrainedTokenizerBase) -> Writers:
    """Return the writers of the files that transformers needs beside the weights, or peft beside the adapter."""
    writers: Writers = {}
    if getattr(model, "peft_config", None):
        writers[ADAPTER_CONFIG_NAME] = lambda folder: _save_adapter_config(model, folder)
    else:
        writers[CONFIG_NAME] = lambda folder: _save_config(model, folder)
    if model.can_generate():
        # Not save_pretrained: it refuses published settings (a temperature without do_sample) once one of them, such as
        # the stop tokens, has changed, and accepts them unchanged (transformers#29988). They are kept, as vLLM reads
        # the temperature and transformers do_sample.
        settings = model.generation_config
        writers[GENERATION_CONFIG_NAME] = lambda folder: settings.to_json_file(
            folder / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"]
        )
    writers["tokenizer"] = tokenizer.save_pretrained
    return writers


def list_final_files(recipe: Recipe) -> Writers:
    """Return the writers of the files of a finished model only: its card, and the processor of a full model."""
    writers: Writers = {CARD: lambda folder: write_model_card(recipe, folder / CARD)}
    if recipe.adapter is None:
        writers["processor"] = lambda folder: copy_processor(recipe.model, folder)
    return writers


def write_side_files(writers: Writers, folder: Path) -> dict[str, Exception]:
    """Write each file into `folder`, also after one failed. Return the errors by file."""
    errors = {}
    for name, write in writers.items():
        try:
            write(folder)
        except Exception as error:  # tokenizers raises a bare Exception
            errors[name] = error
    return errors


def is_disk_error(error: Exception) -> bool:
    """Return whether the disk is full, read-only or gone; tokenizers says so in the text of a bare Exception."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return (int(number[1]) if number else getattr(error, "errno", None)) in USER_FIXABLE_ERRNOS


def describe_error(error: Exception) -> str:
    """Return the text of an error in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:500].rstrip(".")


def side_file_errors(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield errors for the user that would leave a finished model of this recipe incomplete."""
    errors, names = try_side_files(recipe, tokenizer)
    yield from errors
    if names:
        yield from unwritable_files(recipe, names)


def try_side_files(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Write the side files of this recipe's model into a temporary folder; return errors, and the names of all files.

    The names include those of the weights, which are not written. They are empty if the model can't be built: loading
    its weights reports errors of the model or its adapter.
    """
    try:
        model = _build_without_weights(recipe)
    except Exception:
        return [], []
    errors: list[str] = []
    generation = _generation_config(recipe)
    if isinstance(generation, str):
        errors.append(generation)
    elif generation is not None:
        model.generation_config = generation
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        writers = list_side_files(model, tokenizer) | list_final_files(recipe)
        for name, error in write_side_files(writers, folder).items():
            if not is_disk_error(error):  # of the temporary folder's disk
                errors.append(
                    f"model.name_or_path: {recipe.model.name_or_path}: its {name} can be read but not written again, "
                    f"so the trained model would lack it: {describe_error(error)}. Fix it until transformers' own "
                    "save_pretrained writes it."
                )
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    weights = [ADAPTER_SAFE_WEIGHTS_NAME] if recipe.adapter else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    return errors, [*names, *weights]


def write_model_card(recipe: Recipe, path: Path) -> None:
    """Write README.md of the finished model: its base and its recipe. A README.md that no run wrote is kept."""
    if is_foreign_card(path):
        print(f"{path} was not written by janus-sft and is kept: there is no model card", flush=True)
        return
    base = recipe.model.name_or_path
    metadata = {
        "library_name": "transformers" if recipe.adapter is None else "peft",
        "tags": ["janus-sft", recipe.preference.loss if recipe.preference else "sft"],
        **({} if Path(base).is_dir() else {"base_model": base}),
    }
    path.write_text(
        f"---\n{yaml.safe_dump(metadata)}---\n\n# {Path(recipe.output_dir).name}\n\n"
        f"`{base}`, {CARD_MARK}\n\n```yaml\n{recipe.to_yaml()}```\n",
        encoding="utf-8",
    )


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    """Save the configuration as PreTrainedModel.save_pretrained does, with the model's own code."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
    if model.is_remote_code():
        custom_object_save(model, folder, config=model.config)
    model.config.save_pretrained(folder)


def _save_adapter_config(model: "PeftModel", folder: Path) -> None:
    """Save the adapter's configuration as PeftModel.save_pretrained does."""
    settings = copy.copy(model.peft_config[model.active_adapter])
    settings.inference_mode = True
    settings.base_model_name_or_path = settings.base_model_name_or_path or model.get_base_model().name_or_path
    settings.save_pretrained(str(folder))


def _build_without_weights(recipe: Recipe) -> "PreTrainedModel | PeftModel":
    """Return the model of a recipe, with its adapter, on PyTorch's meta device."""
    model = build_meta_model(trained_config(recipe), recipe.model)
    model.name_or_path = recipe.model.name_or_path
    if recipe.adapter is None:
        return model
    from peft import get_peft_model

    with torch.device("meta"):
        return get_peft_model(model, lora_config(recipe.adapter, model, find_idle_parameters(model)))


def _generation_config(recipe: Recipe) -> GenerationConfig | str | None:
    """Return the model's published generation settings; None if it has none; a string if they can't be read."""
    name = recipe.model.name_or_path
    path = Path(name, GENERATION_CONFIG_NAME)
    try:
        return GenerationConfig.from_pretrained(name, revision=recipe.model.revision or "main")
    except OSError as error:
        if not path.exists():
            return None
        # transformers silently uses its defaults instead of a file that it can't read
        return f"model.name_or_path: {path} can't be read: {describe_error(error)}. Fix it, or remove it."
    except (ValueError, TypeError, AttributeError) as error:
        return f"model.name_or_path: {path}: {describe_error(error)}. Correct that value, or remove the file."


def write_again(folder: Path) -> None:
    """Write the files beside the weights of the finished model in `folder`. Raises UserError if one fails."""
    from transformers.trainer_utils import align_special_tokens

    from train.data.chat.assistant_spans import SpanFinder
    from train.data.chat.template import without_generation_marks
    from train.model.inference import set_stop_tokens
    from train.model.tokenizer import load_chat_tokenizer
    from train.recipe import load_recipe

    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder}: holds no weights. Name the output_dir of a run that saved its model.")
    recipe = load_recipe(folder / "recipe.yaml")
    tokenizer = load_chat_tokenizer(recipe.model, recipe.chat).tokenizer
    stop_tokens = SpanFinder(tokenizer).stop_tokens
    tokenizer.chat_template = without_generation_marks(tokenizer.chat_template)
    model = _build_without_weights(recipe)
    generation = _generation_config(recipe)
    if isinstance(generation, str):
        raise UserError(generation)
    model.generation_config = generation or model.generation_config or GenerationConfig()  # a reward model has none
    set_stop_tokens(model, tokenizer, stop_tokens)
    tokenizer.eos_token = stop_tokens[0]
    tokenizer.pad_token = recipe.training.get("pad_token") or tokenizer.pad_token or tokenizer.eos_token
    align_special_tokens(model, tokenizer)
    writers = list_side_files(model, tokenizer) | list_final_files(recipe)
    errors = write_side_files(writers, folder)
    if errors:
        raise UserError("; ".join(f"{folder}: {name}: {describe_error(error)}" for name, error in errors.items()) + ".")
    print(f"{', '.join(writers)} written to {folder}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = CommandLine(description=__doc__)
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="where a run saved the model")
    options = parser.parse_args(arguments)
    return run_command(lambda: write_again(options.output_dir), "stopped; start the same command again")


if __name__ == "__main__":
    sys.exit(main())
