from pathlib import Path

import pytest
from transformers import AutoTokenizer

from train.data.chat.template import named_templates, render, template_name, use_template, without_generation_marks
from train.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}],
    [
        SYSTEM,
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": " Hello 😀\n\n"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "\nSo long"},
    ],
]


def test_chatml_writes_every_message_as_a_turn_and_adds_none(chatml_tokenizer) -> None:
    text, spans = render(chatml_tokenizer, CONVERSATIONS[2])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi\nthere<|im_end|>\n"
        "<|im_start|>assistant\n Hello 😀\n\n<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n\nSo long<|im_end|>\n"
    )
    assert [text[slice(*span)] for span in spans] == [" Hello 😀\n\n<|im_end|>", "\nSo long<|im_end|>"]
    assert render(chatml_tokenizer, CONVERSATIONS[0])[0].startswith("<|im_start|>user\nHi<|im_end|>\n")


def test_mistral_puts_the_system_message_before_the_first_question(mistral_tokenizer_v1) -> None:
    tokenizer = mistral_tokenizer_v1()
    use_template(tokenizer, "mistral-system")
    text, spans = render(tokenizer, CONVERSATIONS[2])
    assert text == "<s>[INST] Be brief.\nHi\nthere [/INST]  Hello 😀\n\n</s>[INST] Bye [/INST] \nSo long</s>"
    assert [text[slice(*span)] for span in spans] == ["  Hello 😀\n\n</s>", " \nSo long</s>"]
    assert render(tokenizer, CONVERSATIONS[0])[0] == "<s>[INST] Hi [/INST] Hello</s>"
    prompt = tokenizer.apply_chat_template(CONVERSATIONS[1][:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<s>[INST] Be brief.\nHi [/INST]"


@pytest.mark.parametrize("name", ["chatml", "chatml-tools", "mistral-system"])
def test_a_template_without_its_marks_renders_the_same(name: str, tokenizer, mistral_tokenizer_v1) -> None:
    model_tokenizer = tokenizer if name.startswith("chatml") else mistral_tokenizer_v1()
    use_template(model_tokenizer, name)
    marked = model_tokenizer.chat_template
    plain = without_generation_marks(marked)
    assert "generation -%}" not in plain
    for messages in CONVERSATIONS:
        texts = [
            model_tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template)
            for template in (marked, plain)
        ]
        assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "tag",
    [
        "{% generation %}",
        "{%- generation %}",
        "{% generation -%}",
        "{%- generation -%}",
        "{%+ generation %}",
        "{% generation +%}",
    ],
)
def test_a_removed_mark_still_trims_the_same_white_space(tag: str, tokenizer) -> None:
    template = (
        "{% for m in messages %}\n  x  \n  " + tag + "\n {{ m.content }} \n {%- endgeneration %}\n\n y{% endfor %}"
    )
    texts = [
        tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False, chat_template=text)
        for text in (template, without_generation_marks(template))
    ]
    assert texts[0] == texts[1]


def test_a_template_without_marks_renders_without_spans(tokenizer) -> None:
    assert render(tokenizer, CONVERSATIONS[1]) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n",
        [],
    )


def test_a_template_of_other_control_tokens_is_refused(mistral_tokenizer_v1) -> None:
    with pytest.raises(UserError, match=r"<\|im_end\|>, <\|im_start\|>, which the tokenizer .* does not have"):
        use_template(mistral_tokenizer_v1(), "chatml")


def test_an_unknown_template_is_refused_with_the_list_of_names(tokenizer) -> None:
    assert named_templates() == ["chatml", "chatml-tools", "mistral-system"]
    with pytest.raises(UserError, match=r"no template 'chatlm'.*chatml, chatml-tools, mistral-system"):
        use_template(tokenizer, "chatlm")
    with pytest.raises(UserError, match="no template"):
        use_template(tokenizer, "missing.jinja")


def test_a_users_template_is_read_from_its_file(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}", encoding="utf-8")
    use_template(tokenizer, str(path))
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_invalid_jinja_is_reported_with_its_line(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages }}\n{% if %}", encoding="utf-8")
    with pytest.raises(UserError, match=r"own.jinja, line 2"):
        use_template(tokenizer, str(path))


def test_a_file_that_is_not_text_is_named(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(b"\x80PNG{{ messages }}")
    with pytest.raises(UserError, match=r"own\.jinja can't be read as UTF-8 text"):
        use_template(tokenizer, str(path))


def test_a_template_that_refuses_a_conversation_is_accepted(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ raise_exception('a system message, please') }}", encoding="utf-8")
    use_template(tokenizer, str(path))
    assert "please" in tokenizer.chat_template


def test_the_saved_tokenizer_serves_what_training_used(chatml_tokenizer, tmp_path: Path) -> None:
    trained = render(chatml_tokenizer, CONVERSATIONS[2])[0]
    chatml_tokenizer.chat_template = without_generation_marks(chatml_tokenizer.chat_template)
    chatml_tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.apply_chat_template(CONVERSATIONS[2], tokenize=False) == trained


def test_a_template_file_that_is_not_utf8_is_an_error(tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"own.jinja can't be read as UTF-8 text"):
        use_template(tokenizer, str(path))


def test_a_template_is_named_by_its_file_or_else_by_its_model(tokenizer, tmp_path: Path) -> None:
    tokenizer.name_or_path = "some/model"
    assert template_name(tokenizer) == "the template of some/model"
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}", encoding="utf-8")
    use_template(tokenizer, str(path))
    assert template_name(tokenizer) == f"the template {path}"
    use_template(tokenizer, None)
    assert template_name(tokenizer) == "the template of some/model"
