"""An adapter saved without a tokenizer is measured with the tokenizer and chat template of its base."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from harness_tasks import multiple_choice
from transformers import AutoModelForCausalLM, AutoTokenizer

from train.errors import UserError
from train.evaluation.models.options import LocalModel
from train.evaluation.models.responses import generate_answers
from train.llm.request import Decoding

RULES = "class Rule:\n    check = staticmethod(lambda question, text: True)\n\nRULES = {'any': Rule}\n"
SYSTEMS = ("Be a river.", "Be a stone.")


@pytest.fixture
def adapter(tiny_chat_model: Path, tmp_path: Path) -> Path:
    """An adapter as peft saves it: only weights and the name of the base."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_chat_model), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("*token*"))
    return tmp_path / "adapter"


@pytest.fixture
def whole(adapter: Path, tiny_chat_model: Path) -> Path:
    """The same adapter with a copy of its base's tokenizer in its folder."""
    folder = adapter.with_name("whole")
    shutil.copytree(adapter, folder)
    AutoTokenizer.from_pretrained(tiny_chat_model).save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows with answers, which `rules` and `gain` read."""
    path = tmp_path / "rows.jsonl"
    with path.open("w", encoding="utf-8") as lines:
        for number in range(6):
            texts = {"system": SYSTEMS[number % 2], "user": f"question {number // 2}", "assistant": f"answer {number}"}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            lines.write(json.dumps({"messages": messages, "rule": "any", "held_out": "rule"}) + "\n")
    return path


def test_gain_equals_that_of_the_adapter_with_a_tokenizer(
    command: Callable[..., int], adapter: Path, whole: Path, tiny_chat_model: Path, data: Path
) -> None:
    results = {}
    for folder in adapter, whole:
        assert command("gain", "--model", folder, "--before", tiny_chat_model, "--data", data) == 0
        results[folder] = json.loads((folder / "gain.json").read_text(encoding="utf-8"))["models"]["after"]["overall"]
    assert results[adapter] == results[whole]
    assert command("gain", "--model", whole, "--before", adapter, "--data", data) == 0


def test_answers_equal_those_of_the_adapter_with_a_tokenizer(
    command: Callable[..., int], adapter: Path, whole: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "rules.py").write_text(RULES, encoding="utf-8")
    short = ["--max-new-tokens", "8"]
    rules = ["--rules", tmp_path / "rules.py", "--data", data, "--before", whole, "--after", adapter]
    assert command("rules", *rules, *short) == 0
    answers = [json.loads(line)["answers"] for line in (adapter / "answers.jsonl").read_text("utf-8").splitlines()]
    assert [before for before, _ in answers] == [after for _, after in answers]
    assert any(after for _, after in answers)
    asked = tmp_path / "asked.jsonl"
    messages = [{"role": role, "content": "a river"} for role in ("system", "user")]
    row = {"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    asked.write_text(json.dumps(row | {"messages": messages}) + "\n", encoding="utf-8")
    for folder in adapter, whole:
        assert command("ifeval", "--model", folder, "--data", asked, *short) == 0
    assert (adapter / "ifeval_answers.jsonl").read_text("utf-8") == (whole / "ifeval_answers.jsonl").read_text("utf-8")


def test_the_harness_uses_the_tokenizer_of_the_base(
    command: Callable[..., int], adapter: Path, whole: Path, tmp_path: Path
) -> None:
    documents = [
        {"question": f"Which is {number}?", "choices": ["a river", "stone"], "answer": number % 2}
        for number in range(8)
    ]
    (tmp_path / "documents.jsonl").write_text(
        "".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8"
    )
    task = multiple_choice("rivers", tmp_path / "documents.jsonl")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rivers.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    for folder in adapter, whole:
        assert command("harness", "--model", folder, "--tasks", "rivers", "--include-path", tmp_path / "tasks") == 0
    assert (adapter / "harness_rows.jsonl").read_text("utf-8") == (whole / "harness_rows.jsonl").read_text("utf-8")


def test_the_adapters_own_tokenizer_takes_precedence(
    command: Callable[..., int], whole: Path, data: Path, says_no: Callable[..., str]
) -> None:
    """A template that loses system messages, in the adapter's folder alone."""
    tokenizer = AutoTokenizer.from_pretrained(whole)
    tokenizer.chat_template = "{{ messages[-1].content }}"
    tokenizer.save_pretrained(whole)
    assert f"the template of {whole} loses messages" in says_no("gain", "--model", whole, "--data", data)


@pytest.mark.parametrize("option", ["--model", "--before"])
def test_no_tokenizer_at_all_is_an_error(
    option: str, adapter: Path, tiny_chat_model: Path, data: Path, tmp_path: Path, says_no: Callable[..., str]
) -> None:
    bare = tmp_path / "bare"
    AutoModelForCausalLM.from_pretrained(tiny_chat_model).save_pretrained(bare)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"base_model_name_or_path": str(bare)}))
    models = {"--model": tiny_chat_model, option: adapter}
    given = [word for pair in models.items() for word in pair]
    error = says_no("gain", *given, "--data", data, "--json", tmp_path / "gain.json")
    assert error.startswith("--model or --before")
    assert f"{adapter} has no tokenizer, and its base has none" in error
    assert f"{bare} can't be loaded" in error
    config.write_text(json.dumps({"peft_type": "LORA"}))
    error = says_no("gain", *given, "--data", data, "--json", tmp_path / "gain.json")
    assert f"{config} names no base model" in error


def test_vllm_gets_the_tokenizer_of_the_base(
    adapter: Path, whole: Path, tiny_chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for vllm prints its arguments and exits."""
    (tmp_path / "vllm").write_text('#!/bin/sh\necho "$@"\nexit 1\n', encoding="utf-8")
    (tmp_path / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for folder, where in (adapter, tiny_chat_model), (whole, whole):
        with pytest.raises(UserError, match=f"serve {tiny_chat_model} .* --tokenizer {where} "):
            generate_answers(
                LocalModel(str(folder), engine="vllm"),
                [[{"role": "user", "content": "a river"}]],
                Decoding(2, temperature=0.0),
                tmp_path / "a.sqlite",
            )
