"""Recipes: errors name the line, the key and what to write; valid recipes load and round-trip."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pytest
import yaml

from train.errors import UserError
from train.recipe import Recipe, load_recipe
from train.recipe.__main__ import recipe_schema
from train.recipe.sft_config import OWNED, training_fields, training_model
from train.recipe.yaml_document import _Loader

ROOT = Path(__file__).parents[2]
RECIPES = sorted(path for kind in ("sft", "preference") for path in (ROOT / "recipes").glob(f"*/{kind}/*.yaml"))

GOOD = """\
model:
  name_or_path: some/model
chat:
  template: chatml
data:
  sources:
    - path: rows.jsonl
  max_length: 512
training:
  learning_rate: 5e-6
output_dir: outputs/test
"""


@pytest.fixture
def recipe_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("recipe.yaml")
    path.write_text(GOOD, encoding="utf-8")
    return path


def load_error(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


# Each case: text of the valid recipe, its replacement, and parts of the one-line error.
BROKEN: dict[str, tuple[str, str, list[str]]] = {
    "misspelt key": (
        "learning_rate",
        "learning_rat",
        ["recipe.yaml:10: training.learning_rat: unknown key", "`training.learning_rate`"],
    ),
    "key of another section": (
        "output_dir:",
        "learning_rate: 1e-5\noutput_dir:",
        ["recipe.yaml:11: learning_rate: unknown", "`training.learning_rate`"],
    ),
    "misspelt section": ("training:", "trainig:", ["recipe.yaml:9: trainig", "Did you mean `training`?"]),
    "misspelt key of a list item": (
        "path: rows",
        "pth: x\n      path: rows",
        ["recipe.yaml:7: data.sources.0.pth", "`data.sources.0.path`"],
    ),
    "other trainers' name": (
        "output_dir:",
        "max_seq_length: 8\noutput_dir:",
        ["max_seq_length: unknown", "`data.max_length`"],
    ),
    "older name": ("learning_rate: 5e-6", "evaluation_strategy: steps", [":10:", "`training.eval_strategy`"]),
    "unknown key, nothing near": (
        "output_dir:",
        "zzqx: 1\noutput_dir:",
        ["zzqx: unknown key", "Allowed: model, chat, data,"],
    ),
    "unknown TRL field": (
        "learning_rate: 5e-6",
        "frobnicate: 1",
        ["training.frobnicate: unknown key", "TRL's SFTConfig"],
    ),
    "no max_length": (
        "  max_length: 512\n",
        "",
        ["recipe.yaml:5: data.max_length: missing", "no default", "unnoticed"],
    ),
    "no model": ("model:\n  name_or_path: some/model\n", "", ["recipe.yaml:1: model: missing"]),
    "no output_dir": ("output_dir: outputs/test\n", "", ["output_dir: missing", "finished model"]),
    "max_length too small": ("512", "7", ["recipe.yaml:8: data.max_length: found 7", ">= 8"]),
    "max_length with a comma": ("512", "8,192", ["data.max_length: found '8,192'", "an integer", "`8192`"]),
    "number as text": ("5e-6", '"5e-6"', ["training.learning_rate: found '5e-6'", "a number", "`5e-6`"]),
    "share instead of an integer": ("512", "512.5", ["data.max_length: found 512.5", "an integer"]),
    "truth for a number": ("5e-6", "true", ["training.learning_rate: found true", "a number"]),
    "not a finite number": ("5e-6", ".nan", ["training.learning_rate: found NaN", "a number"]),
    "negative rate": ("5e-6", "-1", ["training.learning_rate: found -1", ">= 0"]),
    "batch of none": (
        "learning_rate: 5e-6",
        "per_device_train_batch_size: 0",
        ["found 0", "an integer >= 1"],
    ),
    "no epochs": ("learning_rate: 5e-6", "num_train_epochs: 0", ["found 0", "a number > 0"]),
    "unknown choice": (
        "chat:",
        "  dtype: bf16\nchat:",
        ["recipe.yaml:3: model.dtype: found 'bf16'", "float16, float32, auto", "`bfloat16`"],
    ),
    "unknown choice of an enum of transformers": (
        "learning_rate: 5e-6",
        "lr_scheduler_type: cosin",
        ["'cosin'", "linear", "`cosine`"],
    ),
    "unknown choice in TRL's metadata": ("learning_rate: 5e-6", "loss_type: nlll", ["training.loss_type", "`nll`"]),
    "yes is text in YAML 1.2": (
        "max_length",
        "packing: yes\n  max_length",
        ["data.packing: found 'yes'", "true or false", "`true`"],
    ),
    "false for the choice no": ("learning_rate: 5e-6", "eval_strategy: false", ["found false", "Did you mean `no`?"]),
    "number for text": (
        "chat:",
        "  revision: 1234567\nchat:",
        ["model.revision: found 1234567", 'Did you mean `"1234567"`?'],
    ),
    "section without keys": (
        "  name_or_path: some/model\n",
        "",
        ["recipe.yaml:1: model: found nothing (null)", "name_or_path"],
    ),
    "no sources": ("\n    - path: rows.jsonl", " []", ["data.sources: found a list of 0", "at least one"]),
    "one source, no list": ("- path: rows.jsonl", "path: rows.jsonl", ["data.sources: found a section", "a list"]),
    "weight of nothing": (
        "rows.jsonl",
        "rows.jsonl\n      weight: 0",
        ["recipe.yaml:8: data.sources.0.weight: found 0", "> 0"],
    ),
    "validation share above 1": (
        "max_length",
        "validation: 1.5\n  max_length",
        ["data.validation: found 1.5", "> 0 and < 1"],
    ),
    "bad validation source": (
        "max_length",
        "validation: [{file: x}]\n  max_length",
        ["data.validation.0.path: missing", "2 errors"],
    ),
    "unknown policy": ("template: chatml", "system_role: trun", ["chat.system_role: found 'trun'", "`turn`"]),
    "unknown template": (
        "chatml",
        "chatlm",
        ["recipe.yaml:4: chat.template: found 'chatlm'", "mistral-system", "`chatml`"],
    ),
    "missing template file": ("chatml", "./none.jinja", ["chat.template: there is no file ./none.jinja"]),
    "missing DeepSpeed file": (
        "learning_rate: 5e-6",
        "deepspeed: ds.json",
        ["training.deepspeed: there is no file ds.json"],
    ),
    "quantized, no adapter": (
        "output_dir:",
        "quantization: {}\noutput_dir:",
        ["recipe.yaml:11: quantization", "Add `adapter: {r: 16}`"],
    ),
    "8 bits": (
        "output_dir:",
        "adapter: {}\nquantization: {load_in_4bit: false}\noutput_dir:",
        ["load_in_4bit: found false", "Allowed: true"],
    ),
    "adapter on the head": (
        "output_dir:",
        "adapter: {target_modules: [lm_head]}\noutput_dir:",
        ["adapter.target_modules.0", "lm_head"],
    ),
    "one module, no list": (
        "output_dir:",
        "adapter: {target_modules: q_proj}\noutput_dir:",
        ["adapter.target_modules: found 'q_proj'", "all-linear", "a list"],
    ),
    "two precisions": (
        "learning_rate: 5e-6",
        "bf16: true\n  fp16: true",
        ["recipe.yaml:11: training.fp16", "`training.bf16`", "Keep one"],
    ),
    "nothing to evaluate on": (
        "learning_rate: 5e-6",
        "eval_strategy: steps",
        ["training.eval_strategy: there is nothing", "`data.validation`"],
    ),
    "best without evaluation": (
        "learning_rate: 5e-6",
        "load_best_model_at_end: true",
        ["training.load_best_model_at_end", "eval_strategy"],
    ),
    "steps that don't meet": (
        "training:\n",
        "  validation: 0.1\ntraining:\n  load_best_model_at_end: true\n  eval_strategy: steps\n"
        "  eval_steps: 30\n  save_steps: 100\n",
        ["`training.save_steps` (100) is not a multiple of `training.eval_steps` (30)"],
    ),
    "two durations": (
        "learning_rate: 5e-6",
        "max_steps: 5\n  num_train_epochs: 1",
        ["training.max_steps", "num_train_epochs"],
    ),
    "prefetch without workers": (
        "learning_rate: 5e-6",
        "dataloader_prefetch_factor: 2",
        ["training.dataloader_num_workers"],
    ),
    "secret where none is known": (
        "output_dir:",
        "tracking:\n  wandb: {api_key: abc123}\noutput_dir:",
        ["tracking.wandb.api_key: a recipe holds no secrets"],
    ),
    "secret in a free section": (
        "learning_rate: 5e-6",
        "accelerator_config: {hf_token: abc123}",
        ["accelerator_config.hf_token", "no secrets"],
    ),
    "duplicate key": (
        "output_dir:",
        "seed: 1\nseed: 2\noutput_dir:",
        ["recipe.yaml:12: seed: given twice", "recipe.yaml:11"],
    ),
    "tab": ("  max_length", "\tmax_length", ["recipe.yaml:8: not valid YAML", "spaces, not with tabs"]),
    "colon in a value": ("some/model", "some: model", ["recipe.yaml:2: not valid YAML", "Quote values"]),
    "open bracket": ("rows.jsonl", "[rows.jsonl", ["not valid YAML", "bracket"]),
    "foreign tag": (
        "some/model",
        "!!python/object:os.system x",
        ["recipe.yaml:2: model.name_or_path: the tag", "not allowed"],
    ),
    "endless alias": (
        "  name_or_path: some/model",
        "  &a [*a]",
        ["recipe.yaml:2", "more values than a recipe can have"],
    ),
    "key that is no text": ("output_dir:", "1: x\noutput_dir:", ["recipe.yaml:11: the top level: a key must be text"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_errors_name_line_key_and_what_to_write(recipe_file: Path, refused: Callable[..., str], case: str) -> None:
    old, new, words = BROKEN[case]
    assert old in GOOD
    recipe_file.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    message = refused("--recipe", recipe_file)
    for part in words:
        assert part in message
    assert "abc123" not in message  # secrets are not printed
    if "2 errors" not in words:
        assert "\n" not in message  # one error, without consequential ones


@pytest.mark.parametrize("name", OWNED)
def test_fields_owned_by_another_key_are_refused_with_that_key(recipe_file: Path, name: str) -> None:
    message = load_error(recipe_file, f"training.{name}=x")
    assert f"training.{name}: not set here: {OWNED[name]}." in message


def test_keys_named_instead_of_owned_fields_exist() -> None:
    for name, key in (("max_length", "data.max_length"), ("trust_remote_code", "model.trust_remote_code")):
        assert f"`{key}`" in OWNED[name]
    assert set(OWNED) <= set(training_fields())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "recipe.yaml: empty"),
        (b"# only a remark\n", "recipe.yaml: empty"),
        (b"- model\n- data\n", "recipe.yaml:1: found a list of 2"),
        (b"model\n", "recipe.yaml:1: found 'model'"),
        (b"model:\n  name_or_path: caf\xe9\n", "recipe.yaml:2: byte 0xe9 is not UTF-8"),
        (b"model:\n  name_or_path: a\x07b\n", "recipe.yaml:2: character U+0007"),
        (b"[" * 5_000, "nested too deeply"),
        (b"a: 1\n---\nb: 2\n", "recipe.yaml:2: not valid YAML"),
    ],
)
def test_files_without_a_recipe_are_errors(recipe_file: Path, content: bytes, words: str) -> None:
    recipe_file.write_bytes(content)
    assert words in load_error(recipe_file)


def test_a_missing_file_is_an_error_with_a_similar_name(recipe_file: Path) -> None:
    assert load_error(Path("recpe.yaml")) == "recpe.yaml: this recipe doesn't exist. Did you mean `recipe.yaml`?"


def test_a_folder_is_an_error_with_its_recipes(recipe_file: Path) -> None:
    message = load_error(recipe_file.absolute().parent)
    assert "a folder" in message
    assert "recipe.yaml" in message


def test_all_errors_are_reported_at_once_by_line(recipe_file: Path) -> None:
    text = GOOD.replace("chatml", "chatlm").replace("512", "x").replace("learning_rate", "learning_rat")
    recipe_file.write_text(text + "seed: -1\nquantization: {}\nseed: 3\n", encoding="utf-8")
    first, *lines = load_error(recipe_file, "model.dtype=int8", "nonsense").splitlines()
    assert first == "recipe.yaml has 8 errors:"
    locations = [line.split(": ")[0].strip() for line in lines]
    lines_of_file = [4, 8, 10, 12, 13, 14]
    assert locations == [f"recipe.yaml:{n}" for n in lines_of_file] + [
        "override `model.dtype=int8`",
        "override `nonsense`",
    ]


def test_overrides_by_dotted_key(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "training.learning_rate=1e-5",
            "data.sources.0.path=other.jsonl",
            "adapter.r=8",
            "tracking.wandb.tags=[a, b]",
            "training.lr_scheduler_type=cosine",
            "training.lr_scheduler_kwargs={num_cycles: 2}",
            "training.eval_strategy=no",
            "chat.template=",
        ],
    )
    assert recipe.training["learning_rate"] == 1e-5
    assert recipe.data.sources[0].path == "other.jsonl"
    assert recipe.adapter is not None
    assert recipe.adapter.r == 8
    assert recipe.tracking.wandb is not None
    assert recipe.tracking.wandb.tags == ("a", "b")
    assert recipe.training["lr_scheduler_kwargs"] == {"num_cycles": 2}
    assert recipe.training["eval_strategy"] == "no"
    assert recipe.chat.template is None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rate", "override `training.learning_rate`: expected key=value"),
        ("=3", "expected key=value"),
        ("training..x=3", "expected key=value"),
        ("learning_rate=3", "override `learning_rate=3`: learning_rate: unknown key. Did you mean `training.lea"),
        ("data.max_length=x", "override `data.max_length=x`: data.max_length: found 'x'"),
        ("data.sources.1.path=x", "data.sources has 1 items, numbered from 0; there is no 1"),
        ("data.sources.first.path=x", "there is no first"),
        ("model.name_or_path.x=1", "model.name_or_path is 'some/model' and has no keys"),
        ("output_dir={a", "override `output_dir={a`: not valid YAML"),
        ("model={dtype: float32}", "model.name_or_path: missing"),
    ],
)  # fmt: skip
def test_errors_in_overrides_name_the_override(recipe_file: Path, override: str, words: str) -> None:
    assert words in load_error(recipe_file, override)


def test_secrets_in_overrides_are_not_printed(recipe_file: Path) -> None:
    for override in "training.hub_token=abc123", "training={hub_token: abc123}", "tracking.wandb.api_key=abc123":
        message = load_error(recipe_file, override)
        assert "secrets" in message
        assert "abc123" not in message


def test_an_override_of_the_duration_replaces_that_of_the_file(recipe_file: Path) -> None:
    recipe_file.write_text(GOOD.replace("learning_rate: 5e-6", "num_train_epochs: 4"), encoding="utf-8")
    assert load_recipe(recipe_file, ["training.max_steps=3"]).training == {"max_steps": 3}
    recipe_file.write_text(GOOD.replace("learning_rate: 5e-6", "max_steps: 9"), encoding="utf-8")
    assert load_recipe(recipe_file, ["training.num_train_epochs=2"]).training == {"num_train_epochs": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-6", 5e-6), ("1E5", 1e5), (".5", 0.5), ("3.", 3.0), ("-.inf", float("-inf")), ("1_000", "1_000"),
        ("no", "no"), ("off", "off"), ("on", "on"), ("yes", "yes"), ("y", "y"), ("true", True), ("FALSE", False),
        ("010", 10), ("0o10", 8), ("0x1F", 31), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        ("~", None), ("null", None), ("'5e-6'", "5e-6"), ('"no"', "no"), ("+7", 7), ("1e", "1e"), ("<<", "<<"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(recipe_file: Path, text: str, value: Any) -> None:
    recipe = load_recipe(recipe_file, [f"training.accelerator_config.value={text}"])
    scalar = recipe.training["accelerator_config"]["value"]
    assert (type(scalar), scalar) == (type(value), value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_recipe_loads_validates_and_round_trips(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(path)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(resolved) == recipe
    assert recipe.to_yaml().startswith(f"# Resolved by janus-sft from {path}\n")
    for text in path.read_text(encoding="utf-8"), recipe.to_yaml():
        jsonschema.validate(yaml.load(text, _Loader), recipe_schema())
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert (
        path.parent / first.removeprefix("# yaml-language-server: $schema=")
    ).resolve() == ROOT / "recipes/schema.json"
    assert 40 <= len(rest) + 1 <= 70
    assert f"--recipe {path.relative_to(ROOT)}" in path.read_text(encoding="utf-8")


def test_a_resolved_recipe_lists_the_effective_defaults_of_trl(recipe_file: Path, tmp_path: Path) -> None:
    from trl import SFTConfig

    recipe = load_recipe(recipe_file)
    comment = recipe.to_yaml().splitlines()[1]
    shown = yaml.safe_load("{" + comment.partition("does not set: ")[2] + "}")
    effective = SFTConfig(output_dir=str(tmp_path), use_cpu=True, **recipe.training)
    assert {"bf16", "gradient_checkpointing", "max_grad_norm"} <= shown.keys()
    assert shown == {name: getattr(effective, name) for name in shown}
    assert not shown.keys() & recipe.training.keys()
    assert load_recipe(_written(tmp_path / "resolved.yaml", recipe.to_yaml())) == recipe


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_resolved_recipe_keeps_all_kinds_of_values(recipe_file: Path) -> None:
    odd = ["no", "5e-6", "0o17", "1_000", "null", "", "a: b", "#x", "é", "two\nlines", " x ", "2024-01-01", "=", "<<"]
    values = {"texts": odd, "numbers": [1, -1.5, 1e-07, 1e22], "others": [True, None, {"a": []}]}
    recipe_file.write_text(GOOD.replace("5e-6", f"5e-6\n  accelerator_config: {json.dumps(values)}"), encoding="utf-8")
    recipe = load_recipe(recipe_file, ["data.sources=[{path: a}, {path: b, weight: 0.5}]", "adapter={}", "seed=7"])
    assert recipe.training["accelerator_config"] == values
    Path("resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe("resolved.yaml") == recipe
    # YAML 1.1 loaders, such as PyYAML's, read the same texts.
    assert yaml.safe_load(recipe.to_yaml())["training"]["accelerator_config"]["texts"] == odd
    assert "with data.sources=[{path: a}, {path: b, weight: 0.5}] adapter={} seed=7\n" in recipe.to_yaml()


def test_recipes_are_frozen(recipe_file: Path) -> None:
    recipe = load_recipe(recipe_file)
    with pytest.raises(ValueError, match="frozen"):
        recipe.data.max_length = 9  # type: ignore[misc]


def test_the_schema_file_is_up_to_date() -> None:
    assert json.loads((ROOT / "recipes/schema.json").read_text(encoding="utf-8")) == recipe_schema(), (
        "write it again: python -m train.recipe --schema > recipes/schema.json"
    )


def test_every_key_of_the_schema_has_a_description_and_no_others_are_allowed() -> None:
    schema = recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    sections = {"Recipe": schema, "training": schema["properties"]["training"], **schema["$defs"]}
    for section_name, section in sections.items():
        assert section["additionalProperties"] is False, section_name
        for name, key in section["properties"].items():
            resolved = {**schema["$defs"].get(key.get("$ref", "").rpartition("/")[2], {}), **key}
            assert resolved.get("description"), f"{section_name}.{name}"


def test_loading_imports_no_heavy_package() -> None:
    program = """
import sys
from train.recipe import load_recipe
load_recipe("recipes/janus-7b/sft/full.yaml", ["training.learning_rate=1e-5"])
print([name for name in ("torch", "transformers", "trl", "peft", "datasets", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_schema_command_prints_the_schema_file() -> None:
    command = [sys.executable, "-m", "train.recipe", "--schema"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "recipes/schema.json").read_text(encoding="utf-8")


def test_parsed_fields_are_those_of_trl() -> None:
    from trl import SFTConfig

    real = dataclasses.fields(SFTConfig)
    assert list(training_fields()) == [field.name for field in real]
    for field in real:
        read = training_fields()[field.name]
        if read.default is not None:
            assert read.default == field.default, field.name


def test_defaults_of_trl_are_valid_and_enums_are_their_values(tmp_path: Path) -> None:
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    allowed = training_model()
    for field in dataclasses.fields(SFTConfig):
        if field.name not in OWNED and field.default is not dataclasses.MISSING and field.name != "output_dir":
            allowed.model_validate({field.name: field.default})
    schema = allowed.model_json_schema()["properties"]
    assert schema["optim"]["enum"] == [optimizer.value for optimizer in OptimizerNames]
    assert schema["warmup_steps"]["type"] == "number"  # steps or a share
    training = {"warmup_steps": 10, "logging_steps": 0.1, "fsdp": None, "lr_scheduler_type": "cosine", "bf16": False}
    allowed.model_validate(training)
    SFTConfig(output_dir=str(tmp_path), use_cpu=True, **training)


def test_times_are_written_as_slurm_writes_them(recipe_file: Path) -> None:
    from train.loop.time_limit import parse_time_limit

    for written, seconds in (("90:00", 5_400), ("11:30:00", 41_400), ("2-00:00:05", 172_805)):
        assert (
            parse_time_limit(str(load_recipe(recipe_file, [f"save.time_limit={written}"]).save.time_limit)) == seconds
        )
    for wrong in ("tomorrow", "1:2:3:4", "11:30:0"):
        error = load_error(recipe_file, f"save.time_limit={wrong}")
        assert "Allowed: text such as '11:30:00' or '2-00:00:00'; or null" in error


def test_the_sections_are_as_documented() -> None:
    names = ["model", "chat", "data", "adapter", "quantization", "preference", "training", "tracking"]
    names += ["save", "guards", "system_gain", "evaluation", "output_dir", "seed"]
    assert list(Recipe.model_fields) == names


def test_a_missing_template_suggests_only_jinja_files(recipe_file: Path) -> None:
    Path("note.md").write_text("a note")
    overrides = "chat.template=note.jinja"
    assert "Did you mean" not in load_error(recipe_file, overrides)
    Path("notes.jinja").write_text("a template")
    assert load_error(recipe_file, overrides).endswith("Did you mean `notes.jinja`?")


def test_the_settings_of_samples_under_pressure_are_those_of_the_built_in_rows() -> None:
    from train.pressure.tactics import SETTINGS
    from train.recipe.measurements import PressureSetting

    assert get_args(PressureSetting) == SETTINGS
