"""Reasoning before an answer is separated from it, and nothing else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.llm.reasoning import without_reasoning
from train.llm.reasoning.forms import FORMS


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("<think>\nHm, Bern.\n</think>\n\nBern.", "Bern.", "Hm, Bern."),
        ("\n<think></think>\n\nBern.", "Bern.", ""),
        ("Hm, Bern.\n</think>\n\nBern.", "Bern.", "Hm, Bern."),  # opened by the template
        ("Hm, Bern.</think>\nBern.", "Bern.", "Hm, Bern."),
        ("`zip`? Like\n```\nzip(a)\n```\n</think>\n\nBern.", "Bern.", "`zip`? Like\n```\nzip(a)\n```"),
        ("```\nhm\n</think>\n```", "```\nhm\n</think>\n```", None),
        ("[THINK]Hm.[/THINK]Bern.", "Bern.", "Hm."),
        ("<seed:think>Hm.</seed:think>Bern.", "Bern.", "Hm."),
        ("<think>a <think>b</think> c", "c", "a <think>b"),
        ("Bern.", "Bern.", None),
        ("", "", None),
        ("  Bern. \n", "  Bern. \n", None),
        ("Models write <think>\nhm\n</think>\nbefore it.", "Models write <think>\nhm\n</think>\nbefore it.", None),
        ("It ends with `</think>`\nand then", "It ends with `</think>`\nand then", None),
        ("It ends with </think> and then", "It ends with </think> and then", None),
        ("Hm, Bern.</think>Bern.", "Bern.", "Hm, Bern."),
        ("a short one </think> **Bern.**", "a short one </think> **Bern.**", None),  # prose may say so
        ("A short one. </think> **Bern.**", "**Bern.**", "A short one."),
        ("用户问首都。</think>伯尔尼。", "伯尔尼。", "用户问首都。"),
        ("</think>\n\nBern.", "Bern.", ""),
        ("<think>a</think>\n<think>b</think>\nBern.", "Bern.", "a\nb"),
        ("<think>The tag `</think>` ends it.</think>Bern.", "Bern.", "The tag `</think>` ends it."),
        ("<think>a ` b</think>c` d", "c` d", "a ` b"),
        ("<think>a <think>b</think> c</think>Bern.", "Bern.", "a <think>b</think> c"),
        ("\ufeff<think>Hm.</think>Bern.", "Bern.", "Hm."),
        ("\u200b\n<THINK>Hm.</Think >Bern.", "Bern.", "Hm."),
        ('<think time="2s">Hm.</think>Bern.', "Bern.", "Hm."),
        ("```\n<think>Hm.</think>\n```\nBern.", "Bern.", "Hm."),
        ("<think>Hm.</think>\n<answer>\nBern.\n</answer>", "Bern.", "Hm."),  # Hunyuan
        ("<think>Hm.</think><response>Bern.</response>", "Bern.", "Hm."),  # Granite 3.3, ERNIE
        ("<Thought>Hm.</Thought>\n<Output>\nBern.", "Bern.", "Hm."),  # Marco-o1, cut
    ],
)
def test_answer_and_reasoning_are_separated(text: str, answer: str, reasoning: str | None) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.reasoning, reply.unfinished) == (answer, reasoning, False)


OF_FORMS: list[tuple[str, str | None, str | None]] = [
    ("DeepSeek, Qwen, GLM and most others", "<longcat_think>Hm.</longcat_think>Bern.", "<thinking>Hm"),
    ("tags that were escaped for HTML", "&lt;think&gt;Hm.&lt;/think&gt;Bern.", "&lt;think&gt;Hm"),
    ("an empty tag", "<think/>Bern.", None),
    ("Magistral, Ministral", "[THINK]Hm.[/THINK]Bern.", "[THINK]Hm"),
    ("Kimi-VL", "◁think▷Hm.◁/think▷Bern.", "◁think▷Hm"),
    (
        "Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2",
        "<|START_THINKING|>Hm.<|END_THINKING|><|START_RESPONSE|>Bern.<|END_RESPONSE|>",
        "<|START_THINKING|>Hm",
    ),
    (
        "Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2",
        "<|begin_of_thought|>Hm.<|end_of_thought|>\n\n<|begin_of_solution|>Bern.<|end_of_solution|>",
        "<|begin_of_thought|>Hm",
    ),
    (
        "Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2",
        "<|thought_start|>\nHm.\n<|thought_end|>\nBern.",
        "<|thought_start|>Hm",
    ),
    ("Apertus", "<|inner_prefix|>Hm.<|inner_suffix|>Bern.<|assistant_end|>", "<|inner_prefix|>Hm"),
    (
        "Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2",
        "<|think:start|>Hm.<|think:end|>Bern.",
        "<|think:start|>Hm",
    ),
    ("Solar Open", "<|think|>Hm.<|end|><|begin|>assistant<|content|>Bern.<|end|>", "<|think|>Hm.<|end|>"),
    (
        "Kimi K3",
        "<|open|>think<|sep|>Hm.<|close|>think<|sep|><|open|>response<|sep|>Bern.<|close|>response<|sep|><|end_of_msg|>",
        "<|open|>think<|sep|>Hm",
    ),
    (
        "Inkling",
        "<|message_model|><|content_thinking|>Hm.<|end_message|><|message_model|><|content_text|>Bern.<|end_message|>",
        "<|message_model|><|content_thinking|>Hm",
    ),
    ("Gemma 4", "<|channel>thought\nHm.<channel|>Bern.<turn|>", "<|channel>thought\nHm"),
    ("Gemma 4 without its special tokens, so that the end can't be told", None, "thought\nHm.\n\nBern."),
    ("MedGemma 1.5", "<unused94>thought\nHm.<unused95>Bern.", "<unused94>thought\nHm"),
    ("openPangu", "[unused16]Hm.[unused17]Bern.", "[unused16]Hm"),
    ("HyperCLOVA X SEED Think", "/think\nHm.<|im_end|>\n<|im_start|>assistant\nBern.<|im_end|>", None),
    ("gpt-oss without its special tokens", "analysisWe need it short.assistantfinalBern.", "analysisWe need it"),
    (
        "gpt-oss without its special tokens, with reasoning of other first words",
        "analysis\nhm.assistantcommentaryLet me see.assistantfinalBern.",
        None,
    ),
    ("Granite 3.2", "Here's my thought process: Hm.\n\n**Here is my response:** Bern.", None),
    ("Apriel", "Here are my reasoning steps:\nHm.\n[BEGIN FINAL RESPONSE]\nBern.\n[END FINAL RESPONSE]\n<|end|>", None),
    ("HuatuoGPT-o1", "## Thinking\n\nHm.\n\n## Final Response\n\nBern.", None),
    ("a code block with a label", "```thinking\nHm.\n```\nBern.", "```thinking\nHm"),
    (
        "Open WebUI",
        '<details type="reasoning" done="true" duration="2">\n<summary>Thought for 2 s</summary>\nHm.\n</details>\nBern.',
        '<details type="reasoning" done="false">\nHm',
    ),
    ("Poe", "*Thinking...*\n\n> Hm.\n> Hm.\n\nBern.", None),
    ("Ollama's command line", "Thinking...\nHm.\n...done thinking.\n\nBern.", None),
    (
        "Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2",
        "<|thinking_start|>Hm.<|thinking_end|>Bern.",
        "<|reasoning|>Hm",
    ),
    ("Command A, OpenThinker, Sky-T1, MiniCPM, Solar Open 2", "<|think|>Hm.<|/think|>Bern.", None),
    ("s1", "<|im_start|>think\nHm.<|im_start|>answer\nBern.<|im_end|>", "<|im_start|>think\nHm"),
    ("Dify", '<details style="color:gray" open> <summary> Thinking... </summary>\nHm.\n</details>\n\nBern.', None),
    ("DeepSeek, Qwen, GLM and most others", "<SCRATCHPAD>Hm.</ SCRATCHPAD>\nBern.", "<mm:think>Hm"),
    (
        "DeepSeek, Qwen, GLM and most others",
        "<|im_start|>assistant\n<think>Hm.</think>Bern.<|im_end|>",
        "<|im_start|>assistant\n<think>Hm",
    ),
    ("Magistral, Ministral", "[REASONING]Hm.[/REASONING]Bern.", "[THINK]\nHm"),
]
"""A text of each form, and one without an end of its reasoning if the opener alone identifies the form."""


def test_every_form_has_a_case() -> None:
    assert {models for models, _, _ in OF_FORMS} == {form.models for form in FORMS}


@pytest.mark.parametrize(("models", "complete", "cut"), OF_FORMS)
def test_every_form_of_reasoning_is_removed(models: str, complete: str | None, cut: str | None) -> None:
    if complete is not None:
        reply = without_reasoning(complete)
        assert (reply.text, reply.unfinished) == ("Bern.", False)
        assert reply.reasoning is not None
        assert not reply.holds_reasoning
        assert not reply.holds_control_tokens
    if cut is not None:
        reply = without_reasoning(cut)
        assert (reply.text, reply.unfinished) == ("", True)


@pytest.mark.parametrize(
    "text",
    [
        "Hm.<|END_THINKING|><|START_TEXT|>Bern.<|END_TEXT|>",
        "Hm.<|think:end|>Bern.",
        "Hm <channel|> Bern.",
        "Hm.\n[BEGIN FINAL RESPONSE]\nBern.\n[END FINAL RESPONSE]",
        "Hm.</seed:think>Bern.",
        "We need it short.assistantfinalBern.",
        "Hm.[/THINK]Bern.</s>",
    ],
)
def test_reasoning_may_be_opened_by_the_chat_template(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished) == ("Bern.", False)
    assert reply.reasoning in ("Hm.", "Hm", "We need it short.")


NEXT = "<|end|><|start|>assistant"
ANALYSIS = "<|channel|>analysis<|message|>Hm."
FINAL = "<|channel|>final<|message|>Bern."


@pytest.mark.parametrize(
    ("text", "reasoning"),
    [
        (f"{ANALYSIS}{NEXT}{FINAL}", "Hm."),
        (f"<|start|>assistant{ANALYSIS}{NEXT}{FINAL}<|return|>", "Hm."),
        (f"{ANALYSIS}{NEXT}<|channel|>commentary<|message|>I look.{NEXT}{ANALYSIS}{NEXT}{FINAL}", "Hm.\nI look.\nHm."),
        (f"{ANALYSIS}{FINAL}<|end|>", "Hm."),
        (f"Hm.{NEXT}{FINAL}<|return|>", "Hm."),
        (f"{FINAL}<|return|>", None),
        (f"{ANALYSIS}{NEXT}<|channel|>final <|constrain|>json<|message|>Bern.", "Hm."),
        (
            f"<|channel|>commentary to=functions.x <|constrain|>json<|message|>{{}}<|call|>{NEXT}{FINAL}<|return|>",
            "{}",
        ),
        (f"{ANALYSIS}{NEXT}{FINAL}<|return|><|start|>user<|message|>And Geneva?{NEXT}{FINAL}", "Hm."),
    ],
)
def test_the_final_channel_of_gpt_oss_is_the_answer(text: str, reasoning: str | None) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.reasoning, reply.unfinished) == ("Bern.", reasoning, False)
    assert reply.ran_on == ("Geneva" in text)


@pytest.mark.parametrize(
    "text",
    [
        ANALYSIS,
        f"{ANALYSIS}<|end|>",
        f"{ANALYSIS}{NEXT}<|channel|>commentary<|message|>I look.<|end|>",
        f"{ANALYSIS}{NEXT}",
        f"Hm.{NEXT}",
        f"Hm.{NEXT}<|channel|>fin",
        f"{ANALYSIS}<|end|><|start|>user<|message|>And Geneva?{NEXT}{FINAL}",
        "Bern <|channel|>commentary",
        "Bern.<|START_THINKING|>Hm.<|END_THINKING|>And Geneva.",
        "<think>Hm.<|im_end|>\n<|im_start|>user\nAnd Geneva?</think>Bern.",
        "<think>a</think>\n<think>b",
        "<think>The tag `</think>` ends",
    ],
)
def test_a_text_that_may_be_reasoning_is_no_answer(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.unfinished) == ("", True)


@pytest.mark.parametrize(
    "text",
    [
        'The tag "</think>" closes it.',
        "The tags (<think>, </think>) are removed.",
        "Reasoning ends with </think>, then comes the answer.",
        "The closing tag is </think>",
        "```\n<think>hm</think>\nBern\n```",
        "```xml\n<think>hm</think>\n```\nThis is the form.",
        "<root><thought>a</thought></root>",
        "Here is my thought process: I add, and then I multiply.",
        "## Thinking\n\nIt is good for you.",
        "analysis of the data shows growth.",
        "analysisResult = 3",
        "I saw assistantfinal in my output; `assistantfinal` leaks.",
        "```\n<|channel|>analysis<|message|>hm<|end|>\n```\nis how gpt-oss writes.",
        "gpt-oss opens its reasoning with `<|channel|>analysis<|message|>`.",
        "Command A wraps it in `<|START_THINKING|>` and `<|END_THINKING|>`.",
        "<answer>Bern.</answer>",  # the requested form, without reasoning before it
    ],
)
def test_an_answer_that_speaks_of_the_marks_stays(text: str) -> None:
    reply = without_reasoning(text)
    assert (reply.text, reply.reasoning, reply.unfinished) == (text, None, False)


def test_every_text_is_parsed_in_linear_time() -> None:
    """A pattern that tries every length at every position would take minutes."""
    for head in ("", "<think>", "analysis", "*Thinking...*\n> ", "```\n<think>"):
        for piece in ("\n", " ", "`", "</think> x ", "<think>", "x<|im_end|>", "</s>", "\n>"):
            without_reasoning(head + piece * (20_000 // len(piece)))


def test_reasoning_without_an_end_gives_no_answer() -> None:
    reply = without_reasoning("<think>Hm, Bern or Geneva, or")
    assert (reply.text, reply.reasoning, reply.unfinished) == ("", "Hm, Bern or Geneva, or", True)


def test_remaining_tags_are_reported() -> None:
    assert without_reasoning("It is <think>hm</think> Bern.").holds_reasoning
    assert not without_reasoning("<think>hm</think>Bern, I think.").holds_reasoning


@given(st.lists(st.sampled_from(["<think>", "</think>", "[THINK]", "[/THINK]", "`", "\n", " ", "a"])).map("".join))
def test_the_answer_is_part_of_the_text(text: str) -> None:
    reply = without_reasoning(text)
    left = iter(text)
    assert all(sign in left for sign in reply.text)  # all of it, in order: reasoning may follow further on
    if not reply.unfinished:
        assert (reply.reasoning is None) == (reply.text == text)
