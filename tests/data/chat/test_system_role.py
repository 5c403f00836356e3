"""System roles: the template under each policy; every expected text is written by hand."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from chat_templates import TRL_TEMPLATES, say, text_of, tokenizer_with
from transformers import AutoTokenizer

from train.data.chat.system_role import apply_system_role, describe_effect, probe
from train.data.chat.template import has_generation_marks, render, use_template
from train.errors import UserError

PLAIN = ("user: Hi", "assistant: Hello", "user: Bye", "assistant: So long")
SMOLLM2_DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN_DEFAULT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@pytest.fixture
def gemma() -> Any:
    return tokenizer_with("gemma", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"))


# native


@pytest.mark.parametrize("template", ["qwen2_5", "llama3_1", "gemma3", "mistral v3"])
def test_native_does_not_change_the_template(template: str) -> None:
    tokenizer = tokenizer_with(template)
    before = tokenizer.chat_template
    apply_system_role(tokenizer, "native")
    assert tokenizer.chat_template == before


@pytest.mark.parametrize(
    ("template", "why"),
    [("gemma", "it raises: System role not supported"), ("ignores", "their text is not in the render")],
)
def test_native_refuses_a_template_that_loses_system_messages(template: str, why: str) -> None:
    with pytest.raises(UserError, match=r"chat.system_role: native: .* loses system messages") as error:
        apply_system_role(tokenizer_with(template), "native")
    assert f"({why}). Write `merge_into_user`" in str(error.value)
    with pytest.raises(UserError, match=r"chat.system_role: error: .* loses system messages"):
        apply_system_role(tokenizer_with(template), "error", "Be kind.")


# merge_into_user


def test_gemma_with_the_system_message_in_the_user_turn(gemma) -> None:
    apply_system_role(gemma, "merge_into_user")
    assert text_of(gemma, "system: Be brief.", *PLAIN) == (
        "<bos><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nSo long<end_of_turn>\n"
    )
    assert text_of(gemma, "user: Hi", add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert text_of(gemma, "system: S", "user: Hi", add_generation_prompt=True) == (
        "<bos><start_of_turn>user\nS\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    )


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("mistral v1", "<s>[INST] Be brief.\n\nHi [/INST]Hello</s> [INST] Bye [/INST]So long</s> "),
        ("mistral v3", "<s>[INST] Be brief.\n\nHi[/INST] Hello</s>[INST] Bye[/INST] So long</s>"),
        ("llama 2", "<s>[INST] Be brief.\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST] So long </s>"),
        ("ignores", "USER: Be brief.\n\nHi\nASSISTANT: Hello</s>\nUSER: Bye\nASSISTANT: So long</s>\n"),
        # the template's own default would stand beside the row's message
        ("default in a variable", "<|user|>\nBe brief.\n\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\nSo long<|end|>\n"),
    ],
)  # fmt: skip
def test_merge_into_user_writes_it_into_the_first_user_turn(template: str, expected: str) -> None:
    tokenizer = tokenizer_with(template)
    apply_system_role(tokenizer, "merge_into_user")
    assert text_of(tokenizer, "system: Be brief.", *PLAIN) == expected
    assert text_of(tokenizer, *PLAIN) == expected.replace("Be brief.\n\n", "")


def test_merge_into_user_removes_the_templates_default(tokenizer) -> None:
    assert apply_system_role(tokenizer, "merge_into_user").default == SMOLLM2_DEFAULT
    assert text_of(tokenizer, "system: Be brief.", "user: Hi", add_generation_prompt=True) == (
        "<|im_start|>user\nBe brief.\n\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text_of(tokenizer, "user: Hi") == "<|im_start|>user\nHi<|im_end|>\n"


SHIPPED = sorted(path.stem for path in TRL_TEMPLATES.glob("*.jinja") if not path.stem.startswith("muse_glimmer"))


@pytest.mark.parametrize("template", SHIPPED)
def test_merge_into_user_renders_as_messages_merged_by_hand(template: str) -> None:
    """With every template that TRL ships, marks and tools too. Muse Glimmer's dated default can't be removed."""
    tokenizer, plain = tokenizer_with(template), tokenizer_with(template)
    if apply_system_role(tokenizer, "merge_into_user").default is not None:
        apply_system_role(plain, "native", "")
    in_parts = probe(plain).contents_are_parts

    def messages(*turns: str) -> list[dict[str, Any]]:
        if not in_parts:
            return say(*turns)
        return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in say(*turns)]

    separate = messages("system: A", "system: B", "user: Hi", *PLAIN[1:])
    by_hand = messages("user: A\n\nB\n\nHi", *PLAIN[1:])
    assert render(tokenizer, separate) == render(plain, by_hand)
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}}]  # fmt: skip
    try:
        expected = render(plain, by_hand, tools)
    except (jinja2.TemplateError, TypeError):
        return  # a template that has no tools
    assert render(tokenizer, separate, tools) == expected


ODD: dict[str, tuple[tuple[str, ...], str]] = {
    "two in a row": (("system: A", "system: B", "user: Hi", "assistant: Yo"), "USER: A\n\nB\n\nHi\nASSISTANT: Yo</s>\n"),
    "in the middle": (
        ("system: A", "user: Hi", "assistant: Yo", "system: B", "user: Bye", "assistant: Ok"),
        "USER: A\n\nHi\nASSISTANT: Yo</s>\nUSER: B\n\nBye\nASSISTANT: Ok</s>\n",
    ),
    "empty": (("system: ", "user: Hi", "assistant: Yo"), "USER: Hi\nASSISTANT: Yo</s>\n"),
    "blank": (("system:  \n\t ", "user: Hi", "assistant: Yo"), "USER: Hi\nASSISTANT: Yo</s>\n"),
    "blank, then one": (("system:  ", "system: A", "user: Hi"), "USER: A\n\nHi\n"),
    "blank at the end": (("user: Hi", "assistant: Yo", "system: \n"), "USER: Hi\nASSISTANT: Yo</s>\n"),
    "blanks around it": (("system:  A\n", "user: Hi"), "USER:  A\n\n\nHi\n"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_empty_and_repeated_system_messages_in_the_user_turn(case: str) -> None:
    tokenizer = tokenizer_with("ignores")
    apply_system_role(tokenizer, "merge_into_user")
    turns, expected = ODD[case]
    assert text_of(tokenizer, *turns) == expected


@pytest.mark.parametrize(
    "turns",
    [
        ("system: A", "assistant: Yo", "user: Hi"),
        ("user: Hi", "system: A", "assistant: Yo"),
        ("user: Hi", "assistant: Yo", "system: A"),
        ("system: A",),
    ],
)
def test_a_system_message_that_no_user_turn_follows_is_refused(turns: tuple[str, ...]) -> None:
    tokenizer = tokenizer_with("ignores")
    apply_system_role(tokenizer, "merge_into_user")
    with pytest.raises(
        jinja2.TemplateError, match=r"a system message is .*chat.system_role: merge_into_user could write"
    ):
        text_of(tokenizer, *turns)


def test_contents_in_parts_are_merged_too(gemma) -> None:
    """A server may send contents as lists of parts; Gemma 3's template renders both, and trims each part."""
    tokenizer = tokenizer_with("gemma3", "<bos>", "<eos>")
    apply_system_role(tokenizer, "merge_into_user")
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "A"}]},
        {"role": "user", "name": "Eve", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]},
    ]
    expected = "<bos><start_of_turn>user\nA\n\nHi<start_of_image><end_of_turn>\n"
    assert tokenizer.apply_chat_template(parts, tokenize=False) == expected
    parts[1]["content"] = [{"type": "image"}]
    expected = "<bos><start_of_turn>user\nA<start_of_image><end_of_turn>\n"
    assert tokenizer.apply_chat_template(parts, tokenize=False) == expected


def test_the_other_keys_of_the_user_turn_that_templates_know_are_kept(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.name }}:{{ m.content }}/{% endfor %}"
    apply_system_role(tokenizer, "merge_into_user")
    messages = [*say("system: A"), {"role": "user", "name": "Eve", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "Eve:A\n\nHi/"


# turn


def test_gemma_with_a_system_turn_of_its_own_as_in_sysgen(gemma) -> None:
    assert apply_system_role(gemma, "turn").handling == "raises"
    assert text_of(gemma, "system: Be brief.", *PLAIN) == (
        "<bos><start_of_turn>system\nBe brief.<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n"
        "<start_of_turn>model\nHello<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\nSo long<end_of_turn>\n"
    )
    assert text_of(gemma, "system:  S \n", "user: Hi ", add_generation_prompt=True) == (  # trimmed, as a user's text is
        "<bos><start_of_turn>system\nS<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"
    )
    assert text_of(gemma, "user: Hi") == "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    assert text_of(gemma, "system: ", "user: Hi") == "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    assert text_of(gemma, "system: A", "system: B", "user: Hi") == (
        "<bos><start_of_turn>system\nA\n\nB<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n"
    )
    with pytest.raises(jinja2.TemplateError, match=r"stands after other turns, and chat.system_role: turn has a place"):
        text_of(gemma, "user: Hi", "system: A", "assistant: Yo")
    assert probe(gemma).handling == "turn"


def test_turn_in_the_syntax_of_other_templates() -> None:
    tokenizer = tokenizer_with("ignores")
    apply_system_role(tokenizer, "turn")
    assert text_of(tokenizer, "system: S", "user: Hi", add_generation_prompt=True) == "SYSTEM: S\nUSER: Hi\nASSISTANT:"
    tokenizer = tokenizer_with("gemma3", "<bos>", "<eos>")  # which merges it, if it is let
    apply_system_role(tokenizer, "turn")
    assert text_of(tokenizer, "system: S", "user: Hi") == (
        "<bos><start_of_turn>system\nS<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n"
    )


def test_turn_leaves_a_template_that_has_one() -> None:
    tokenizer = tokenizer_with("mistral v7")
    before = tokenizer.chat_template
    apply_system_role(tokenizer, "turn")
    assert tokenizer.chat_template == before
    assert text_of(tokenizer, "system: S", "user: Hi") == "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Hi[/INST]"


def test_turn_is_refused_where_none_can_be_made() -> None:
    with pytest.raises(UserError, match=r"chat.system_role: turn: .*its user turn begins with '\[INST\] '"):
        apply_system_role(tokenizer_with("mistral v1"), "turn")
    with pytest.raises(UserError, match=r"begins with '<s>\[INST\] '"):
        apply_system_role(tokenizer_with("llama 2"), "turn")
    # <|user|> is one token; <|system|> would be split
    tokenizer = tokenizer_with("ignores", special=("<|user|>", "<|assistant|>"))
    tokenizer.chat_template = tokenizer.chat_template.replace("USER: ", "<|user|>").replace(
        "ASSISTANT: ", "<|assistant|>"
    )
    with pytest.raises(UserError, match=r"the tokenizer has no such token as <\|user\|> for the system"):
        apply_system_role(tokenizer, "turn")
    # a BOS that is written out can't be kept from standing there twice
    tokenizer = tokenizer_with("gemma", "<bos>", "<eos>")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "<bos>")
    with pytest.raises(UserError, match="changes the text after it"):
        apply_system_role(tokenizer, "turn")


# error


def test_error_refuses_rows_with_a_system_message(gemma) -> None:
    apply_system_role(gemma, "error")
    with pytest.raises(jinja2.TemplateError, match=r"chat.system_role: error allows none"):
        text_of(gemma, "system: S", "user: Hi")
    with pytest.raises(jinja2.TemplateError, match=r"chat.system_role: error allows none"):
        text_of(gemma, "user: Hi", "assistant: Yo", "system: S", "user: Bye")
    assert text_of(gemma, "system:  ", "user: Hi") == "<bos><start_of_turn>user\nHi<end_of_turn>\n"


# default_system


@pytest.mark.parametrize("role", ["native", "turn", "error"])
def test_default_system_replaces_the_templates_default(role: Any, tokenizer) -> None:
    apply_system_role(tokenizer, role, "Say 'é' + \"x\" \\n {{ 1 }} TEXT\n😀")
    expected = "<|im_start|>system\nSay 'é' + \"x\" \\n {{ 1 }} TEXT\n😀<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert text_of(tokenizer, "user: Hi") == expected
    assert text_of(tokenizer, "system:  ", "user: Hi") == expected
    if role != "error":
        assert text_of(tokenizer, "system: S", "user: Hi") == (
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        )
        # one that comes later doesn't begin the conversation
        assert text_of(tokenizer, "user: Hi", "system: S") == expected + "<|im_start|>system\nS<|im_end|>\n"


def test_default_system_under_the_policies_for_templates_without_the_role(gemma) -> None:
    own = gemma.chat_template
    apply_system_role(gemma, "merge_into_user", "Be kind.")
    assert text_of(gemma, "user: Hi") == "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n"
    assert text_of(gemma, "system: S", "user: Hi") == "<bos><start_of_turn>user\nS\n\nHi<end_of_turn>\n"
    gemma.chat_template = own
    apply_system_role(gemma, "turn", "Be kind.")
    assert text_of(gemma, "user: Hi") == (
        "<bos><start_of_turn>system\nBe kind.<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n"
    )


def test_an_empty_default_system_removes_the_templates_own(tokenizer) -> None:
    assert apply_system_role(tokenizer, "native", "").default == SMOLLM2_DEFAULT
    assert text_of(tokenizer, "user: Hi") == "<|im_start|>user\nHi<|im_end|>\n"
    assert text_of(tokenizer, "system: S", "user: Hi") == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )
    assert probe(tokenizer).default is None


def test_an_empty_default_system_removes_qwens_with_tools_too() -> None:
    tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
    tokenizer = tokenizer_with("qwen2_5")
    with_system = text_of(tokenizer, "system: S", "user: Hi", tools=tools)
    assert QWEN_DEFAULT in text_of(tokenizer, "user: Hi", tools=tools)
    apply_system_role(tokenizer, "native", "")
    assert text_of(tokenizer, "user: Hi") == "<|im_start|>user\nHi<|im_end|>\n"
    assert text_of(tokenizer, "system: S", "user: Hi", tools=tools) == with_system
    without = text_of(tokenizer, "user: Hi", tools=tools)
    assert without.startswith("<|im_start|>system\n\n\n# Tools\n\nYou may call one or more functions")
    assert without.endswith("</tool_call><|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")


def test_a_computed_default_is_silenced_by_an_empty_message() -> None:
    tokenizer = tokenizer_with("default in a variable")
    apply_system_role(tokenizer, "native", "")
    assert text_of(tokenizer, "user: Hi") == "<|user|>\nHi<|end|>\n"
    assert text_of(tokenizer, "system: S", "user: Hi") == "<|system|>\nS<|end|>\n<|user|>\nHi<|end|>\n"


def test_an_empty_default_system_is_refused_if_the_text_cannot_be_removed() -> None:
    with pytest.raises(UserError, match=r"adds 'Cutting Knowledge Date.*can't be removed"):
        apply_system_role(tokenizer_with("llama3_1"), "native", "")
    tokenizer = tokenizer_with("default in a variable")
    tokenizer.chat_template = tokenizer.chat_template.replace("{% if ns.system %}", "{% if true %}")
    with pytest.raises(UserError, match=r"adds 'You are Al.'.*can't be removed"):
        apply_system_role(tokenizer, "native", "")


def test_an_empty_default_system_changes_no_template_without_a_default() -> None:
    tokenizer = tokenizer_with("llama3")
    before = tokenizer.chat_template
    apply_system_role(tokenizer, "native", "")
    assert tokenizer.chat_template == before


# what was chosen stays


@pytest.mark.parametrize("role", ["merge_into_user", "turn"])
def test_generation_marks_still_mark_the_answers(role: Any, tokenizer) -> None:
    tokenizer = tokenizer_with("gemma_training", "<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"))
    apply_system_role(tokenizer, role, "Be kind.")
    assert has_generation_marks(tokenizer.chat_template)
    for turns in (PLAIN, ("system: S", *PLAIN)):
        text, spans = render(tokenizer, say(*turns))
        assert [text[slice(*span)].strip() for span in spans] == ["Hello<end_of_turn>", "So long<end_of_turn>"]


@pytest.mark.parametrize(
    ("role", "default"), [("merge_into_user", "Be kind."), ("turn", None), ("turn", "Be kind."), ("error", None)]
)
def test_the_saved_tokenizer_carries_the_policy(role: Any, default: str | None, gemma, tmp_path: Path) -> None:
    apply_system_role(gemma, role, default)
    gemma.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.chat_template == gemma.chat_template
    for turns in (PLAIN, PLAIN[:3]):
        expected = text_of(gemma, *turns, add_generation_prompt=True)
        assert text_of(saved, *turns, add_generation_prompt=True) == expected
    if role != "error":
        assert text_of(saved, "system: S", *PLAIN) == text_of(gemma, "system: S", *PLAIN)


def test_a_new_policy_replaces_the_one_of_an_earlier_training(gemma) -> None:
    apply_system_role(gemma, "merge_into_user", "Be kind.")
    once = gemma.chat_template
    apply_system_role(gemma, "native")  # what was chosen then stays
    assert gemma.chat_template == once
    apply_system_role(gemma, "merge_into_user", "Be kind.")
    assert gemma.chat_template == once
    apply_system_role(gemma, "turn")
    assert text_of(gemma, "user: Hi") == "<bos><start_of_turn>user\nHi<end_of_turn>\n"
    assert text_of(gemma, "system: S", "user: Hi") == (
        "<bos><start_of_turn>system\nS<end_of_turn>\n<start_of_turn>user\nHi<end_of_turn>\n"
    )


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}x{% endif %}\n", "\n\n {{- 'x' }}", " x "])
def test_the_policy_does_not_change_the_templates_white_space(start: str, tokenizer) -> None:
    tokenizer.chat_template = start + "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"
    before = text_of(tokenizer, *PLAIN)
    apply_system_role(tokenizer, "error")
    assert text_of(tokenizer, *PLAIN) == before


def test_our_own_templates_take_every_policy(mistral_tokenizer_v1) -> None:
    tokenizer = mistral_tokenizer_v1()
    use_template(tokenizer, "mistral-system")
    assert apply_system_role(tokenizer, "native", "Be kind.").merged_into == "first"
    assert text_of(tokenizer, "user: Hi") == "<s>[INST] Be kind.\nHi [/INST]"
    use_template(tokenizer, "mistral-system")
    apply_system_role(tokenizer, "merge_into_user")
    assert text_of(tokenizer, "system: S", "user: Hi") == "<s>[INST] S\n\nHi [/INST]"


@pytest.mark.parametrize(("role", "default"), [("merge_into_user", None), ("native", ""), ("native", "Be kind.")])
def test_a_template_that_numbers_turns_takes_every_policy(role: Any, default: str | None, tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ loop.index }}: {{ m.content }}\n{% endfor %}"
    apply_system_role(tokenizer, role, default)
    first = {"merge_into_user": "user 1: Hi\n"}.get(
        role, "system 1: Be kind.\nuser 2: Hi\n" if default else "user 1: Hi\n"
    )
    assert text_of(tokenizer, "user: Hi") == first
    merged = "user 1: S\n\nHi\n" if role == "merge_into_user" else "system 1: S\nuser 2: Hi\n"
    assert text_of(tokenizer, "system: S", "user: Hi") == merged


def test_an_error_names_the_file_that_the_template_came_from(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    use_template(tokenizer, str(path))
    with pytest.raises(UserError, match=rf"the template {path} loses system messages"):
        apply_system_role(tokenizer, "native")
    own = tokenizer_with("ignores")
    own.name_or_path = "some/model"
    with pytest.raises(UserError, match="the template of some/model loses system messages"):
        apply_system_role(own, "native")


# what results, in words

FIRST = "A system message goes into the first user turn."
MIDDLE = "One in the middle of a conversation goes into a user turn."
REFUSED = "A conversation with a system message is refused."
OWN = f"A conversation without one gets the template's own: '{QWEN_DEFAULT}'."
OUTCOMES: list[tuple[str, Any, str | None, list[str], str | None]] = [
    ("ignores", "merge_into_user", None, [FIRST, MIDDLE, "A conversation without one gets none."], None),
    ("llama3", "error", None, [REFUSED, "A conversation without one gets none."], None),
    ("qwen2_5", "error", None, [REFUSED, OWN], QWEN_DEFAULT),
    (
        "llama3",
        "error",
        "Be kind.",
        [REFUSED, "A conversation that doesn't begin with one gets chat.default_system: 'Be kind.'."],
        "Be kind.",
    ),
    (
        "qwen2_5",
        "merge_into_user",
        None,
        [FIRST, MIDDLE, f"A conversation without one gets none: the template's own is removed ('{QWEN_DEFAULT}')."],
        None,
    ),
    (
        "qwen2_5",
        "native",
        None,
        ["A system message is a turn of its own.", "One in the middle of a conversation is a turn there.", OWN],
        QWEN_DEFAULT,
    ),
]


@pytest.mark.parametrize(("template", "role", "default", "sentences", "given"), OUTCOMES)
def test_the_effect_is_described_in_sentences(
    template: str, role: Any, default: str | None, sentences: list[str], given: str | None
) -> None:
    tokenizer = tokenizer_with(template)
    effect = describe_effect(tokenizer, apply_system_role(tokenizer, role, default), default)
    assert (effect.sentences, effect.default, effect.changed) == (sentences, given, role != "native")


def test_a_clock_does_not_count_as_a_change_of_the_template(tokenizer) -> None:
    tokenizer.chat_template = (
        "{{ strftime_now('%f') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    before = apply_system_role(tokenizer, "native")
    effect = describe_effect(tokenizer, before, None)
    assert not effect.changed
    assert f"To every conversation the template adds: {before.header!r}." in effect.sentences
