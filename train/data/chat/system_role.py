"""What the recipe wants done with system messages, written into the chat template.

`chat.system_role` and `chat.default_system` become part of the template's own text, so that training, evaluation and
serving all render one thing and the saved tokenizer carries what was chosen:

| system_role     | a system message at the start           | a later one                                       |
|-----------------|-----------------------------------------|---------------------------------------------------|
| native          | as the template writes it               | as the template writes it                         |
| merge_into_user | in the first user turn, before its text | in the user turn that follows it; refused where   |
|                 | and a blank line                        | another turn, or none, comes first                |
| turn            | native where that is a turn of its own; | native where that is; else refused                |
|                 | else a turn made like the user's        |                                                   |
| error           | refused                                 | refused                                           |

Several in a row are joined by a blank line (native: as the template does it). Empty and blank ones count as absent
(native without default_system: the template sees them; rows that `formats` reads have none). A conversation that
doesn't begin with a system message gets `default_system`, where one is set, as if it stood there.

A default of the template's own stays under native and error unless `default_system` takes its place; "" removes it.
Under merge_into_user and a derived turn it is removed always, as it would stand beside the row's own message.

Refusals are the template's (`raise_exception`), so they hold where the model is served, too. Why any of this:
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

# The pieces that go before a template. What they need is kept to plain Jinja that servers other than transformers know.
# The text of `message`, also where it comes as a list of parts. No loop goes over the parts: from one vLLM would
# conclude that the template wants parts, and give it nothing else.
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
""".replace("\n that", " that").replace("TEXT", _TEXT)  # a line break would be part of Jinja's string
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
# The line break after the last tag is trimmed (trim_blocks): what follows renders as at the start of a template.
_END = "{%- set messages = janus.messages %}\n"


def apply_system_role(
    tokenizer: PreTrainedTokenizerBase, system_role: SystemRole, default_system: str | None = None
) -> Probe:
    """Write the recipe's policy into the tokenizer's template; what the template did with system messages before that.

    Raises UserError where the template would lose system messages or can't be made to do what the recipe says.
    """
    if system_role != "native" and str(tokenizer.chat_template).startswith(_MARK):
        # A model trained by us before: what this recipe says takes the place of what that one said.
        tokenizer.chat_template = tokenizer.chat_template.partition(_END)[2]
    found = probe(tokenizer)
    default = default_system if default_system and default_system.strip() else None
    as_it_is = system_role == "native" or (system_role == "turn" and found.handling == "turn")
    if found.handling in ("ignored", "raises") and (system_role == "native" or (system_role == "error" and default)):
        raise _loses_system_messages(tokenizer, found, system_role)
    removed = default_system is not None and default is None
    if removed and found.header is not None:
        raise _cannot_remove(tokenizer, found.header)
    if found.default is not None and (removed or not (as_it_is or system_role == "error")):
        tokenizer.chat_template = _without_default(tokenizer, found.default)
    if as_it_is and default is None:
        return found
    policy = {"error": _REFUSE, "merge_into_user": _MERGE, "turn": "", "native": ""}[system_role]
    if system_role == "turn" and not as_it_is:
        policy = _turn(tokenizer)
    begin = _BEGIN.replace("ROLE", system_role)
    ours = _DEFAULT.replace("DEFAULT", _quoted(default)) if default is not None else ""
    before_template = policy + ours if system_role == "error" else ours + policy
    tokenizer.chat_template = begin + before_template + _END + str(tokenizer.chat_template)
    return found


@dataclass(frozen=True, slots=True)
class SystemRoleEffect:
    """What rows get of system messages, in `sentences`.

    `default`: that of conversations that have none of their own. `changed`: the template came with other ways.
    """

    sentences: list[str]
    default: str | None
    changed: bool


def describe_effect(tokenizer: PreTrainedTokenizerBase, before: Probe, default_system: str | None) -> SystemRoleEffect:
    """What the settled template of `tokenizer` does, found by rendering it. `before`: what `apply_system_role` gave."""
    plain = find_turns(tokenizer).plain
    now = probe(tokenizer)
    sentences = now.describe_settled()
    default = None
    if default_system and default_system.strip():
        default = default_system
        place = "gets" if default.strip() in plain else "LOSES"
        sentences.append(f"A conversation that doesn't begin with one {place} chat.default_system: {default!r}.")
    elif before.default is not None and before.default in plain:
        default = before.default
        sentences.append(f"A conversation without one gets the template's own: {default!r}.")
    else:
        taken = "" if before.default is None else f": the template's own is taken out ({before.default!r})"
        sentences.append(f"A conversation without one gets none{taken}.")
    if before.header is not None:
        sentences.append(f"To every conversation the template adds: {before.header!r}.")
    if day := date_of(tokenizer):
        sentences.append(
            f"It asks for today's date: rows are rendered with {day:%d %B %Y}, the day on which the run starts, "
            "and the model that is served will see others."
        )
    # A header may hold a clock, which has gone on.
    return SystemRoleEffect(sentences, default, changed=replace(now, header=before.header) != before)


def _turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The Jinja text that writes a system turn in the template's own syntax, proven by rendering.

    Raises UserError where no such turn can be made.
    """
    turns = find_turns(tokenizer)
    opening = re.sub("user", _like_user, turns.opening, flags=re.IGNORECASE)
    closing, trimmed = _user_turn(tokenizer, turns)
    vocabulary = tokenizer.get_vocab()
    foreign = [
        token
        for token in tokenizer.get_added_vocab()
        if token in turns.opening and re.sub("user", _like_user, token, flags=re.IGNORECASE) not in vocabulary
    ]
    if opening == turns.opening or foreign or not closing:
        reason = f"its user turn begins with {turns.opening!r}"
        reason += f", and the tokenizer has no such token as {foreign[0]} for the system" if foreign else ""
        raise _no_turn(tokenizer, reason)
    values = {
        "LEAD": "bos_token" if turns.bos else "''",
        "FORGET": "{%- set bos_token = '' -%}" if turns.bos else "",  # it stands there once
        "OPENING": _quoted(opening),
        "WRITTEN": "janus.system | trim" if trimmed else "janus.system",
        "CLOSING": _quoted(closing),
    }
    piece = re.sub("|".join(values), lambda name: values[name[0]], _TURN)
    template = str(tokenizer.chat_template)
    extended = _BEGIN + piece + _END + template
    for messages, options in _trials():
        try:
            without = render_text(tokenizer, messages, in_parts=turns.in_parts, **options)
        except Refused:
            continue  # tools, where the template has none
        wanted = turns.bos + opening + SYSTEM + closing + without.removeprefix(turns.bos)
        options["template"] = extended
        try:
            given = render_text(tokenizer, system() + messages, in_parts=turns.in_parts, **options)
            same = (given, render_text(tokenizer, messages, in_parts=turns.in_parts, **options)) == (wanted, without)
        except Refused:
            same = False
        if not same:
            raise _no_turn(tokenizer, "a turn put at the start changes what follows it")
    return piece


def _like_user(match: re.Match[str]) -> str:
    """`system` in the case that `user` was written in."""
    word = match[0]
    return "SYSTEM" if word.isupper() else "System" if word[0].isupper() else "system"


def _user_turn(tokenizer: PreTrainedTokenizerBase, turns: Turns) -> tuple[str, bool]:
    """What the template writes after a user's text, and whether it trims that text. Nothing, where that is unclear."""
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
    """The template's text without the system message that it invents, proven by rendering.

    First its literal is taken out of the text, all of the turn or, within a turn that tools need, its words. Where it
    is no literal, the template is given an empty system message, if it then writes nothing.
    Raises UserError where neither works.
    """
    turns = find_turns(tokenizer)
    template = str(tokenizer.chat_template)
    invented = turns.head or turns.plain.partition(QUESTION)[0].removeprefix(turns.bos + turns.opening)
    shorter = template
    for text in (invented, default):
        for literal in {text, _quoted(text)[1:-1], text.replace("\n", "\\n").replace("'", "\\'")} - {""}:
            shorter = shorter.replace(literal, "")
    silenced = _BEGIN.replace("ROLE", "native") + _DEFAULT.replace("DEFAULT", "''") + _END + template
    for candidate in (shorter, silenced):
        if _is_rid_of(tokenizer, candidate, invented, default, turns):
            return candidate
    raise _cannot_remove(tokenizer, default)


def _is_rid_of(tokenizer: PreTrainedTokenizerBase, candidate: str, invented: str, default: str, turns: Turns) -> bool:
    """Whether `candidate` renders as the tokenizer's template does, but for the text `invented`."""
    for messages, options in _trials():
        for conversation in (messages, system() + messages):
            try:
                old = render_text(tokenizer, conversation, in_parts=turns.in_parts, **options)
            except Refused:
                continue
            try:
                new = render_text(tokenizer, conversation, in_parts=turns.in_parts, template=candidate, **options)
            except Refused:
                return False
            if conversation is not messages:  # a system message of its own: nothing may change
                right = new == old
            elif "tools" in options:  # the turn may have to stay for their sake
                right = default not in new
            else:
                right = new == old.replace(invented, "", 1)
            if not right:
                return False
    return True


def _trials() -> list[tuple[Messages, dict[str, Any]]]:
    """Conversations without a system message, each with options of rendering, that a changed template is tried on."""
    return [
        (EXCHANGES, {}),
        (EXCHANGES[:2], {}),
        (EXCHANGES[:1], {"add_generation_prompt": True}),
        (EXCHANGES[:3], {"add_generation_prompt": True}),
        (EXCHANGES, {"tools": _TOOLS}),
    ]


def _quoted(text: str) -> str:
    """`text` as a string of Jinja, which knows the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _loses_system_messages(tokenizer: PreTrainedTokenizerBase, found: Probe, system_role: str) -> UserError:
    how = f"it raises: {found.refusal}" if found.handling == "raises" else "their text is not in the render"
    error = "" if system_role == "error" else ", or `error` if no row has one"
    return UserError(
        f"chat.system_role: {system_role}: {template_name(tokenizer)} loses system messages ({how}). "
        f"Write `merge_into_user` (into the user turn) or `turn` (a turn of its own){error}."
    )


def _no_turn(tokenizer: PreTrainedTokenizerBase, reason: str) -> UserError:
    return UserError(
        f"chat.system_role: turn: no system turn can be made for {template_name(tokenizer)}: {reason}. "
        "Write `merge_into_user`, or name a template that has one with `chat.template`."
    )


def _cannot_remove(tokenizer: PreTrainedTokenizerBase, text: str) -> UserError:
    shown = text if len(text) <= 80 else text[:80] + "..."
    return UserError(
        f"chat: {template_name(tokenizer)} adds {shown!r} to conversations, and that can't be taken "
        "out. Name a template that doesn't with `chat.template`; or keep its text with `chat.system_role: native` and "
        "without `chat.default_system`, or with one that isn't empty."
    )
