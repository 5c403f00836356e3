"""System messages in templates, probed by rendering."""

import pytest
from chat_templates import tokenizer_with

from train.data.chat.system_probe import Probe, probe
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
def test_probe_describes_the_template(template: str) -> None:
    result = probe(tokenizer_with(template))
    facts = (result.handling, result.merged_into, result.default, result.header)
    assert (*facts, result.mid_conversation, result.two_in_a_row, result.empty) == FINDINGS[template]
    assert not result.dated
    assert not result.contents_are_parts


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
    result = probe(tokenizer_with("gptoss"))
    assert result.dated
    assert result.header is not None
    assert result.header.startswith(
        "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06"
    )


def test_probe_of_a_template_that_takes_contents_as_parts() -> None:
    result = probe(tokenizer_with("smolvlm"))
    assert (result.contents_are_parts, result.handling, result.default) == (True, "turn", None)


def test_probe_refuses_a_template_that_loses_more_than_system_messages(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="loses messages of a conversation"):
        probe(tokenizer)
    tokenizer.chat_template = "{{ raise_exception('Not today.') }}"
    with pytest.raises(UserError, match=r"refuses a conversation of two questions and answers \(Not today\)"):
        probe(tokenizer)


def test_a_probe_is_described_in_sentences() -> None:
    assert probe(tokenizer_with("gemma")).describe() == [
        "The unmodified template refuses system messages: System role not supported."
    ]
    assert probe(tokenizer_with("qwen2_5")).describe() == [
        "The unmodified template writes a system message as a turn of its own.",
        f"To a conversation without one it adds its own: '{QWEN_DEFAULT}'.",
    ]
    assert probe(tokenizer_with("mistral v3")).describe_training()[:2] == [
        "A system message goes into the last user turn.",
        "So the earlier answers of a conversation are trained without it.",
    ]


NUMBERED = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
)


def test_numbers_of_turns_are_not_a_default(tokenizer) -> None:
    tokenizer.chat_template = NUMBERED
    result = probe(tokenizer)
    assert (result.handling, result.default, result.header, result.mid_conversation) == ("turn", None, None, "turn")
    tokenizer.chat_template = (
        "{% if messages[0].role != 'system' %}<|im_start|>system 0\nRule 12.<|im_end|>\n{% endif %}" + NUMBERED
    )
    assert probe(tokenizer).default == "Rule 12."


def test_a_clock_is_not_a_default(tokenizer) -> None:
    tokenizer.chat_template = "{{ strftime_now('%H:%M:%S') }}\n" + NUMBERED
    result = probe(tokenizer)
    assert (result.default, result.dated, result.empty) == (None, True, "differs")


@pytest.mark.parametrize("error", ["{{ 1 / 0 }}", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"])
def test_whatever_a_template_raises_is_a_refusal(error: str, tokenizer) -> None:
    plain = tokenizer.chat_template
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}" + error + "{% endif %}" + NUMBERED
    assert probe(tokenizer).handling == "raises"
    tokenizer.chat_template = error + plain
    with pytest.raises(UserError, match=r"refuses a conversation of two .*(ZeroDivision|Recursion)Error"):
        probe(tokenizer)


def test_an_error_names_the_turns_that_a_template_loses(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages[-2:] %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"loses messages of .*\(the first question, the first answer: not as written"):
        probe(tokenizer)


def test_a_refusal_that_quotes_the_message_shows_no_sentinels(tokenizer) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('No ' + messages[0].content) }}{% endif %}"
    tokenizer.chat_template = refusal + NUMBERED
    assert probe(tokenizer).refusal == "No {system}"


def test_a_default_in_the_first_user_turn_does_not_hide_where_turns_begin(tokenizer) -> None:
    tokenizer.chat_template = (
        "{% set given = messages[0].content if messages[0].role == 'system' else 'Be kind.' %}"
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        "{% if loop.first %}{{ given }}\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    result = probe(tokenizer)
    assert (result.handling, result.merged_into, result.default, result.header) == ("merged", "first", "Be kind.", None)
