"""Tokenizers with several named chat templates, and processors with a template for their tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from train.data.chat.template import TEMPLATES, use_template
from train.errors import UserError
from train.model.tokenizer import load_tokenizer
from train.recipe import ModelSection

CHATML = (TEMPLATES / "chatml.jinja").read_text(encoding="utf-8").replace("{% generation %}", "").replace("{% endgeneration %}", "")  # fmt: skip
OTHER = CHATML + "{# the other #}"


@pytest.fixture
def with_templates(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a copy of the tiny model's folder with named templates, in one of the two layouts."""

    def write(layout: str, templates: dict[str, str]) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config.pop("chat_template", None)
        if layout == "list":
            config["chat_template"] = [{"name": name, "template": text} for name, text in templates.items()]
        elif layout == "processor":
            (folder / "chat_template.json").write_text(json.dumps({"chat_template": templates["default"]}))
        else:
            (folder / "additional_chat_templates").mkdir()
            for name, text in templates.items():
                place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
                (folder / place).write_text(text)
        path.write_text(json.dumps(config))
        return folder

    return write


def opened(folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection(name_or_path=str(folder)))


@pytest.mark.parametrize("layout", ["list", "folder"])
def test_default_is_used_and_a_name_chooses(layout: str, with_templates: Callable[..., Path], tmp_path: Path) -> None:
    folder = with_templates(layout, {"default": CHATML, "tool_use": OTHER})
    tokenizer = opened(folder)
    assert use_template(tokenizer, None) == "the tokenizer's own 'default'; not used: tool_use (chat.template: NAME)"
    assert tokenizer.chat_template == CHATML
    tokenizer = opened(folder)
    assert use_template(tokenizer, "tool_use").startswith("the tokenizer's own 'tool_use'")
    assert tokenizer.chat_template == OTHER
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == OTHER
    with pytest.raises(UserError, match=r"no template 'rag'.*chatml.*default, tool_use"):
        use_template(opened(folder), "rag")


def test_names_without_default_are_for_the_user_to_choose_from(with_templates: Callable[..., Path]) -> None:
    folder = with_templates("list", {"tool_use": CHATML, "rag": OTHER})
    with pytest.raises(UserError, match=r"^chat\.template: .* none is called default: tool_use, rag"):
        use_template(opened(folder), None)


def test_a_template_of_a_processor_is_the_tokenizers(with_templates: Callable[..., Path]) -> None:
    tokenizer = opened(with_templates("processor", {"default": CHATML}))
    assert use_template(tokenizer, None) == "the tokenizer's own"
    assert tokenizer.chat_template == CHATML


def test_a_recipe_names_a_template_of_the_tokenizer(
    with_templates: Callable[..., Path], recipe_file: Callable[..., Path], refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from train.sft import main

    folder = with_templates("list", {"default": CHATML, "tool_use": OTHER})
    model = {"name_or_path": str(folder)}
    for template in ("tool_use", None):
        assert main(["--recipe", str(recipe_file(model=model, chat={"template": template})), "--check"]) == 0
        assert f"the tokenizer's own '{template or 'default'}'; not used:" in capsys.readouterr().out
    assert "no template 'rag'" in refused("--recipe", recipe_file(model=model, chat={"template": "rag"}), "--check")
