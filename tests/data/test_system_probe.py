"""What templates do with system messages, found by rendering."""

import pytest
from chat_templates import tokenizer_with

from train.data.system_probe import Probe, probe
from train.errors import UserError

SMOLLM2_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024"

# template: handling, into which turn, default, header, mid-conversation, two in a row, an empty one
FINDINGS: dict[str, tuple[str, str | None, str | None, str | None, str, str, str]] = {
    "gemma": ("raises", None, None, None, "raises", "raises", "raises"),
    "mistral v1": ("raises", None, None, None, "raises", "raises", "raises"),
    "ignores": ("ignored", None, None, None, "ignored", "lost", "absent"),
    "gemma3": ("merged", "first", None, None, "raises", "raises", "differs"),
    "llama 2": ("merged", "first", None, None, "raises", "raises", "differs"),
    "mistral v3": ("merged", "last", None, None, "raises", "raises", "differs"),
    "mistral v7": ("turn", None, None, None, "turn", "kept", "differs"),
    "qwen2_5": ("turn", None, QWEN_DEFAULT, None, "turn", "kept", "differs"),
    "qwen2_5_vl": ("turn", None, "You are a helpful assistant.", None, "turn", "kept", "differs"),
    "default in a variable": ("turn", None, "You are Al.", None, "moved", "lost", "differs"),
    "llama3": ("turn", None, None, None, "turn", "kept", "differs"),
    "llama3_1": ("turn", None, None, DATES, "turn", "kept", "absent"),
    "phi3": ("turn", None, None, None, "turn", "kept", "differs"),
    "phi3_5": ("turn", None, None, None, "turn", "kept", "absent"),
    "deepseekv3": ("turn", None, None, None, "moved", "kept", "absent"),
    "deepseek_r1_distill": ("turn", None, None, None, "moved", "lost", "absent"),
    "cohere": ("turn", None, None, None, "raises", "raises", "differs"),
    "qwen3": ("turn", None, None, None, "turn", "kept", "differs"),
    "qwen3_vl": ("turn", None, None, None, "ignored", "lost", "differs"),
    "qwen3_5_think": ("turn", None, None, None, "raises", "raises", "differs"),
    "glm4moe": ("turn", None, None, None, "turn", "kept", "differs"),
}


@pytest.mark.parametrize("template", FINDINGS)
def test_probe_finds_what_the_template_does(template: str) -> None:
    found = probe(tokenizer_with(template))
    facts = (found.handling, found.merged_into, found.default, found.header)
    assert (*facts, found.mid_conversation, found.two_in_a_row, found.empty) == FINDINGS[template]
    assert not found.dated
    assert not found.contents_are_parts


def test_probe_of_smollm2s_own_template(tokenizer) -> None:
    assert probe(tokenizer) == Probe(
        handling="turn",
        refusal=None,
        merged_into=None,
        default=SMOLLM2_DEFAULT,
        header=None,
        dated=False,
        mid_conversation="turn",
        two_in_a_row="kept",
        empty="differs",
        contents_are_parts=False,
    )


def test_probe_of_a_template_that_knows_the_date() -> None:
    found = probe(tokenizer_with("gptoss"))
    assert found.dated
    assert found.header is not None
    assert found.header.startswith(
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06"
    )


def test_probe_of_a_template_that_wants_contents_in_parts() -> None:
    found = probe(tokenizer_with("smolvlm"))
    assert (found.contents_are_parts, found.handling, found.default) == (True, "turn", None)


def test_probe_refuses_a_template_that_loses_more_than_system_messages(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="loses messages of a conversation"):
        probe(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Not today.') }}"
    with pytest.raises(UserError, match=r"refuses a conversation of two questions and answers \(Not today\)"):
        probe(tokenizer)


def test_the_findings_in_words() -> None:
    assert probe(tokenizer_with("gemma")).describe() == [
        "The template refuses system messages: System role not supported."
    ]
    assert probe(tokenizer_with("qwen2_5")).describe() == [
        "The template writes a system message as a turn of its own.",
        f"To a conversation without one it adds its own: '{QWEN_DEFAULT}'.",
        "One in the middle of a conversation is a turn there.",
    ]
    assert probe(tokenizer_with("mistral v3")).describe()[:2] == [
        "The template writes a system message into the last user turn.",
        "So the earlier answers of a conversation are trained without it.",
    ]
