"""Rows joined of a template's fixed pieces: those that the template gives, for every template of TRL and others."""

import itertools
from typing import Any

import pytest
from chat_templates import CONTROL, INLINE, TRL_TEMPLATES, say, tokenizer_with

from train.data.chat.assistant_spans import SpanFinder
from train.data.chat.pieces import CHECK_EVERY, find_tested_texts
from train.data.chat.rendering import ShortcutError
from train.data.chat.template import TEMPLATES
from train.data.sources.formats import RowError
from train.errors import UserError

CONTENTS = (
    "Hello",
    "",
    "one\n\n  two\nthree",
    "𝔘𝔫𝔦 😀 𐍈 é",
    "  padded \n",
    "user",
    "<think>\nHm.\n</think>\n\nSo it is.",
    "It ends </think> here",
    "<tool_response>a result</tool_response>",
    "a role such as user, system or assistant, its content",
    "/no_think",
    "word " * 500 + "end",
)
PATHS = [*sorted(TRL_TEMPLATES.glob("*.jinja")), *sorted(TEMPLATES.glob("*.jinja"))]
NOT_JOINED = {"deepseek_r1_distill_training", "deepseekv3_training"}
"""Templates under which none of these rows can be trained: their answers begin with <think>."""


def finders(template: str) -> tuple[SpanFinder, SpanFinder]:
    """Return a finder that joins pieces and one that doesn't; skip a template under which nothing can be trained."""
    control = tuple(sorted(set(CONTROL.findall(template))))
    tokenizer = tokenizer_with("chatml" if "chatml" in INLINE else "mistral v7", special=("<|im_end|>", *control))
    tokenizer.chat_template = template
    stops = [token for token in control if "end" in token or "eot" in token]
    tokenizer.eos_token = stops[0] if stops else "</s>"
    try:
        return SpanFinder(tokenizer, fast=True), SpanFinder(tokenizer)
    except UserError as error:
        pytest.skip(f"no answer can be trained: {error}")


def conversations() -> list[list[dict[str, Any]]]:
    """Return conversations with and without system messages, of one to three turns, with all contents in turn."""
    every = []
    for system, turns, first in itertools.product((None, "Be brief.", CONTENTS[2]), (1, 2, 3), range(len(CONTENTS))):
        contents = itertools.islice(itertools.cycle(CONTENTS), first, first + 2 * turns)
        roles = itertools.cycle(("user", "assistant"))
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
        every.append(([{"role": "system", "content": system}] if system else []) + messages)
    return every


def rows(finder: SpanFinder, messages: list[dict[str, Any]]) -> Any:
    try:
        return finder.rows(messages, None, "assistant")
    except RowError as error:
        return error.kind, error.detail


def joined(finder: SpanFinder) -> int:
    """Return the number of sequences of roles whose rows are joined."""
    return sum(pieces is not None for joiner in finder._joiners.values() for pieces in joiner._pieces.values())


@pytest.mark.parametrize("name", [*(path.stem for path in PATHS), *INLINE])
def test_rows_are_those_of_the_template(name: str) -> None:
    path = next((path for path in PATHS if path.stem == name), None)
    fast, exact = finders(path.read_text(encoding="utf-8") if path else INLINE[name])
    for messages in conversations():
        assert rows(fast, messages) == rows(exact, messages)
    assert (joined(fast) == 0) == (name in NOT_JOINED)


def test_texts_that_a_template_tests_for() -> None:
    template = """
    {%- for message in messages %}
        {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
        {%- if message.role in ['system', 'developer'] and message.get('name') %}{{ 'sys: ' + message.content }}
        {%- elif '</think>' in message['content'] %}{{ message.content.split('</end>')[-1].lstrip('\\n') }}
        {%- elif message.content.startswith('<tool>') or message.content[:2] == '!!' %}{% generation %}no{% endgeneration %}
        {%- endif %}
    {%- endfor %}"""
    equal, inside = find_tested_texts(template)
    assert equal == {"user", "system", "developer"}
    assert inside == {"alternate", "</think>", "</end>", "<tool>", "!!"}


LENGTH = "{% if message.content|length == 77 %}, long{% endif %}"


def test_a_template_that_looks_at_something_else_is_noticed() -> None:
    template = INLINE["mistral v7"].replace(
        "message.content + eos_token", f"message.content }}}}{LENGTH}{{{{ eos_token"
    )
    assert LENGTH in template
    fast, exact = finders(template)
    plain, long = say("user: Hi", "assistant: Hello"), say("user: Hi", f"assistant: {'x' * 77}")
    for _ in range(CHECK_EVERY + 1):
        assert rows(fast, plain) == rows(exact, plain)
    (joined_row,) = rows(fast, long)
    assert ", long" not in joined_row.text  # wrong, and found out by a later row
    with pytest.raises(ShortcutError, match="writes 'xxx"):
        [fast.rows(long, None, "assistant") for _ in range(CHECK_EVERY)]


def test_a_template_that_changes_contents_has_no_pieces() -> None:
    fast, exact = finders(
        INLINE["mistral v7"].replace("'[INST]' + message.content", "'[INST]' + message.content|upper")
    )
    messages = say("user: Hi", "assistant: Hello")
    assert rows(fast, messages) == rows(exact, messages)
    assert joined(fast) == 0
