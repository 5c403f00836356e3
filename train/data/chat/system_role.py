"""System roles: the recipe's policy for system messages, written into the chat template.

`chat.system_role` and `chat.default_system` become part of the template's text. So training, evaluation and serving
render the same, and the saved tokenizer carries the policy:

| system_role     | a system message at the start           | a later one                                       |
|-----------------|-----------------------------------------|---------------------------------------------------|
| native          | as the template writes it               | as the template writes it                         |
| merge_into_user | in the first user turn, before its text | in the user turn that follows it; refused if      |
|                 | and a blank line                        | another turn, or none, follows                    |
| turn            | native if that is a turn of its own;    | native if that is; else refused                   |
|                 | else a turn like the user's             |                                                   |
| error           | refused                                 | refused                                           |

Several in a row are joined by a blank line (native: as the template does it). Empty and blank ones count as absent
(native without default_system: the template gets them; rows that `formats` reads have none). A conversation that
doesn't begin with a system message gets `default_system`, if it is set, as its first message.

A default of the template's own stays under native and error unless `default_system` replaces it; "" removes it. Under
merge_into_user and a derived turn it is always removed, as it would be added to the row's own message.

The template itself refuses (`raise_exception`), so refusals hold where the model is served, too. Reasons for all this:
LLaMA-Factory#8217, #7592, ms-swift#2328, QwenLM/Qwen3#1141 (system messages dropped, refused or invented). The derived
turn is what SYSGEN did for Gemma-2 (Jeong et al. 2025, arXiv:2502.11330).
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from train.data.chat.system_probe import (
    EXCHANGES,
    QUESTION,
    SYSTEM,
    Messages,
    Probe,
    Refused,
    Turns,
    find_turns,
    probe,
    render_text,
    system,
)
from train.data.chat.template import date_of, template_name
from train.errors import UserError

__all__ = ["Probe", "SystemRole", "SystemRoleEffect", "apply_system_role", "describe_effect", "probe"]

SystemRole = Literal["native", "merge_into_user", "turn", "error"]

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a town.",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    }
]

# The pieces below precede a template. They use only Jinja that servers other than transformers know.
# _TEXT is the text of `message`, also of a list of parts. There is no loop over the parts: vLLM would conclude from it
# that the template takes parts, and pass nothing else.
_TEXT = "(message.content if message.content is string else (message.content or []) | map(attribute='text') | join)"
_MARK = "{#- janus-sft: chat.system_role: "
_BEGIN = """\
MARKROLE -#}
{%- set janus = namespace(messages=[], system='') -%}
{%- for message in messages -%}
    {%- if message.role != 'system' or TEXT | trim -%}
        {%- set janus.messages = janus.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
""".replace("MARK", _MARK).replace("TEXT", _TEXT)
_REFUSE = """\
{%- for message in janus.messages -%}
    {%- if message.role == 'system' -%}
        {{- raise_exception('there is a system message, and chat.system_role: error allows none') -}}
    {%- endif -%}
{%- endfor -%}
"""
_DEFAULT = """\
{%- if not janus.messages or janus.messages[0].role != 'system' -%}
    {%- set janus.messages = [{'role': 'system', 'content': DEFAULT}] + janus.messages -%}
{%- endif -%}
"""
_MERGE = """\
{%- set messages = janus.messages -%}
{%- set janus.messages = [] -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {%- set janus.system = janus.system + TEXT + '\\n\\n' -%}
    {%- elif not janus.system -%}
        {%- set janus.messages = janus.messages + [message] -%}
    {%- elif message.role != 'user' -%}
        {{- raise_exception('a system message is followed by the role ' + message.role + ', so there is no user turn
 that chat.system_role: merge_into_user could write it into') -}}
    {%- else -%}
        {%- set content = message.content -%}
        {%- if content is string -%}
            {%- set content = janus.system + content -%}
        {%- elif content and content[0].type == 'text' -%}
            {%- set content = [{'type': 'text', 'text': janus.system + content[0].text}] + content[1:] -%}
        {%- else -%}
            {%- set content = [{'type': 'text', 'text': janus.system}] + (content or []) -%}
        {%- endif -%}
        {%- set merged = {'role': 'user', 'content': content} -%}
        {%- if message.name -%}
            {%- set merged = {'role': 'user', 'name': message.name, 'content': content} -%}
        {%- endif -%}
        {%- set janus.messages = janus.messages + [merged] -%}
        {%- set janus.system = '' -%}
    {%- endif -%}
{%- endfor -%}
{%- if janus.system -%}
    {{- raise_exception('a system message is the last, so there is no user turn
 that chat.system_role: merge_into_user could write it into') -}}
{%- endif -%}
""".replace("\n that", " that").replace("TEXT", _TEXT)  # a line break would be part of the Jinja string
_TURN = """\
{%- set messages = janus.messages -%}
{%- set janus.messages = [] -%}
{%- for message in messages -%}
    {%- if message.role != 'system' -%}
        {%- set janus.messages = janus.messages + [message] -%}
    {%- elif janus.messages -%}
        {{- raise_exception('a system message stands after other turns, and chat.system_role: turn has a place for it
 at the start only') -}}
    {%- else -%}
        {%- set janus.system = (janus.system + '\\n\\n' if janus.system else '') + TEXT -%}
    {%- endif -%}
{%- endfor -%}
{%- if janus.system -%}
    {{- LEAD + OPENING + WRITTEN + CLOSING -}}
    FORGET
{%- endif -%}
""".replace("\n at", " at").replace("TEXT", _TEXT)
# The line break after the last tag is trimmed (trim_blocks), so the template renders as if nothing preceded it.
_END = "{%- set messages = janus.messages %}\n"


def apply_system_role(
    tokenizer: PreTrainedTokenizerBase, system_role: SystemRole, default_system: str | None = None
) -> Probe:
    """Write the recipe's policy into the tokenizer's template, and return the probe of the template before that.

    Raises UserError if the template would lose system messages or the policy can't be written into it.
    """
    if system_role != "native" and str(tokenizer.chat_template).startswith(_MARK):
        # A model that was trained by janus-sft: this recipe's policy replaces the earlier one.
        tokenizer.chat_template = tokenizer.chat_template.partition(_END)[2]
    before = probe(tokenizer)
    default = default_system if default_system and default_system.strip() else None
    unchanged = system_role == "native" or (system_role == "turn" and before.handling == "turn")
    loses = before.handling in ("ignored", "raises")
    if loses and (system_role == "native" or (system_role == "error" and default)):
        raise _loses_system_messages(tokenizer, before, system_role)
    remove_default = default_system is not None and default is None
    if remove_default and before.header is not None:
        raise _cannot_remove(tokenizer, before.header)
    if before.default is not None and (remove_default or not (unchanged or system_role == "error")):
        tokenizer.chat_template = _without_default(tokenizer, before.default)
    if unchanged and default is None:
        return before
    policy = {"error": _REFUSE, "merge_into_user": _MERGE, "turn": "", "native": ""}[system_role]
    if system_role == "turn" and not unchanged:
        policy = _derive_turn(tokenizer)
    begin = _BEGIN.replace("ROLE", system_role)
    add_default = _DEFAULT.replace("DEFAULT", _jinja_string(default)) if default is not None else ""
    pieces = policy + add_default if system_role == "error" else add_default + policy
    tokenizer.chat_template = begin + pieces + _END + str(tokenizer.chat_template)
    return before


@dataclass(frozen=True, slots=True)
class SystemRoleEffect:
    """The final template's handling of system messages, in `sentences`.

    `default`: the system message of conversations without one. `changed`: the unmodified template handles them
    differently.
    """

    sentences: list[str]
    default: str | None
    changed: bool


def describe_effect(tokenizer: PreTrainedTokenizerBase, before: Probe, default_system: str | None) -> SystemRoleEffect:
    """Probe the final template of `tokenizer`. `before`: the probe that `apply_system_role` returned."""
    plain = find_turns(tokenizer).plain
    after = probe(tokenizer)
    sentences = after.describe_training()
    default = None
    if default_system and default_system.strip():
        default = default_system
        verb = "gets" if default.strip() in plain else "LOSES"
        sentences.append(f"A conversation that doesn't begin with one {verb} chat.default_system: {default!r}.")
    elif before.default is not None and before.default in plain:
        default = before.default
        sentences.append(f"A conversation without one gets the template's own: {default!r}.")
    else:
        removed = "" if before.default is None else f": the template's own is removed ({before.default!r})"
        sentences.append(f"A conversation without one gets none{removed}.")
    if before.header is not None:
        sentences.append(f"To every conversation the template adds: {before.header!r}.")
    if day := date_of(tokenizer):
        sentences.append(
            f"It writes today's date: rows are rendered with {day:%d %B %Y}, the day on which the run starts; the "
            "served model will see other dates."
        )
    # A header may hold a clock, which has advanced.
    return SystemRoleEffect(sentences, default, changed=replace(after, header=before.header) != before)


def _derive_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return Jinja that writes a system turn in the template's own syntax, proven by rendering.

    Raises UserError if no such turn can be made.
    """
    turns = find_turns(tokenizer)
    opening = re.sub("user", _match_case, turns.opening, flags=re.IGNORECASE)
    closing, trimmed = _find_closing(tokenizer, turns)
    vocabulary = tokenizer.get_vocab()
    foreign = [
        token
        for token in tokenizer.get_added_vocab()
        if token in turns.opening and re.sub("user", _match_case, token, flags=re.IGNORECASE) not in vocabulary
    ]
    if opening == turns.opening or foreign or not closing:
        reason = f"its user turn begins with {turns.opening!r}"
        reason += f", and the tokenizer has no such token as {foreign[0]} for the system" if foreign else ""
        raise _no_turn(tokenizer, reason)
    values = {
        "LEAD": "bos_token" if turns.bos else "''",
        "FORGET": "{%- set bos_token = '' -%}" if turns.bos else "",  # BOS is written once
        "OPENING": _jinja_string(opening),
        "WRITTEN": "janus.system | trim" if trimmed else "janus.system",
        "CLOSING": _jinja_string(closing),
    }
    piece = re.sub("|".join(values), lambda name: values[name[0]], _TURN)
    template = str(tokenizer.chat_template)
    extended = _BEGIN + piece + _END + template
    for messages, options in _test_conversations():
        try:
            without = render_text(tokenizer, messages, in_parts=turns.in_parts, **options)
        except Refused:
            continue  # tools, where the template has none
        expected = turns.bos + opening + SYSTEM + closing + without.removeprefix(turns.bos)
        options["template"] = extended
        try:
            with_system = render_text(tokenizer, system() + messages, in_parts=turns.in_parts, **options)
            plain = render_text(tokenizer, messages, in_parts=turns.in_parts, **options)
            same = (with_system, plain) == (expected, without)
        except Refused:
            same = False
        if not same:
            raise _no_turn(tokenizer, "a turn at the start changes the text after it")
    return piece


def _match_case(match: re.Match[str]) -> str:
    """Return `system` in the case of the matched `user`."""
    word = match[0]
    return "SYSTEM" if word.isupper() else "System" if word[0].isupper() else "system"


def _find_closing(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> tuple[str, bool]:
    """Return the text after a user's text ("" if unclear), and whether the template trims the user's text."""
    blanks = " \n "
    question = [{"role": "user", "content": blanks + QUESTION + blanks}]
    try:
        text = render_text(tokenizer, question, in_parts=turns.in_parts)
    except Refused:
        return "", False
    trimmed = blanks + QUESTION + blanks not in text
    closing = text.rpartition(QUESTION)[2] if trimmed else text.rpartition(QUESTION + blanks)[2]
    return (closing if turns.plain.partition(QUESTION)[2].startswith(closing) else ""), trimmed


def _without_default(tokenizer: PreTrainedTokenizerBase, default: str) -> str:
    """Return the template without its default system message, proven by rendering.

    First its literal is removed from the template: the complete turn or, in a turn that tools need, its text. If there
    is no literal, the template gets an empty system message, provided that it then writes none.
    Raises UserError if neither works.
    """
    turns = find_turns(tokenizer)
    template = str(tokenizer.chat_template)
    invented = turns.head or turns.plain.partition(QUESTION)[0].removeprefix(turns.bos + turns.opening)
    shorter = template
    for text in (invented, default):
        for literal in {text, _jinja_string(text)[1:-1], text.replace("\n", "\\n").replace("'", "\\'")} - {""}:
            shorter = shorter.replace(literal, "")
    silenced = _BEGIN.replace("ROLE", "native") + _DEFAULT.replace("DEFAULT", "''") + _END + template
    for candidate in (shorter, silenced):
        if _removes_default(tokenizer, candidate, invented, default, turns):
            return candidate
    raise _cannot_remove(tokenizer, default)


def _removes_default(
    tokenizer: PreTrainedTokenizerBase, candidate: str, invented: str, default: str, turns: Turns
) -> bool:
    """Return whether `candidate` renders as the tokenizer's template does, except for the text `invented`."""
    for messages, options in _test_conversations():
        for conversation in (messages, system() + messages):
            try:
                old = render_text(tokenizer, conversation, in_parts=turns.in_parts, **options)
            except Refused:
                continue
            try:
                new = render_text(tokenizer, conversation, in_parts=turns.in_parts, template=candidate, **options)
            except Refused:
                return False
            if conversation is not messages:  # with a system message nothing may change
                equal = new == old
            elif "tools" in options:  # the turn may have to stay for the tools
                equal = default not in new
            else:
                equal = new == old.replace(invented, "", 1)
            if not equal:
                return False
    return True


def _test_conversations() -> list[tuple[Messages, dict[str, Any]]]:
    """Return conversations without a system message, each with rendering options, that test a changed template."""
    return [
        (EXCHANGES, {}),
        (EXCHANGES[:2], {}),
        (EXCHANGES[:1], {"add_generation_prompt": True}),
        (EXCHANGES[:3], {"add_generation_prompt": True}),
        (EXCHANGES, {"tools": _TOOLS}),
    ]


def _jinja_string(text: str) -> str:
    """Return `text` as a string literal of Jinja, which knows the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _loses_system_messages(tokenizer: PreTrainedTokenizerBase, before: Probe, system_role: str) -> UserError:
    reason = f"it raises: {before.refusal}" if before.handling == "raises" else "their text is not in the render"
    alternative = "" if system_role == "error" else ", or `error` if no row has one"
    return UserError(
        f"chat.system_role: {system_role}: {template_name(tokenizer)} loses system messages ({reason}). "
        f"Write `merge_into_user` (into the user turn) or `turn` (a turn of its own){alternative}."
    )


def _no_turn(tokenizer: PreTrainedTokenizerBase, reason: str) -> UserError:
    return UserError(
        f"chat.system_role: turn: no system turn can be made for {template_name(tokenizer)}: {reason}. "
        "Write `merge_into_user`, or name a template that has one with `chat.template`."
    )


def _cannot_remove(tokenizer: PreTrainedTokenizerBase, text: str) -> UserError:
    preview = text if len(text) <= 80 else text[:80] + "..."
    return UserError(
        f"chat: {template_name(tokenizer)} adds {preview!r} to conversations, and that can't be removed. Name a "
        "template that doesn't with `chat.template`; or keep its text with `chat.system_role: native` and without "
        "`chat.default_system`, or with one that isn't empty."
    )
