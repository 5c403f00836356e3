"""Columns of a row and keys of its messages that no format reads, and which of them hold content.

--check and the start screen list each of them. One that holds content stops the run, as the model would be trained
without it; `data.sources.N.ignore` is for those that are left out on purpose. Content is a text that is longer than an
id (`is_prose`), except under names of metadata (`METADATA`). A text that is in the conversation anyway is not content
(ultrachat_200k has `prompt` beside `messages`), nor is one that repeats the complete conversation (Alpaca has `text`
beside `instruction` and `output`).
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from train.data.sources.row_errors import is_blank

Unread = dict[str, list[Any]]
"""Values of one row that no format reads, by column (`rationale`) or message key (`messages[].note`)."""

_ORIGIN_WORDS = """
    id ids idx index uuid guid key hash md5 sha sha1 sha256 digest checksum fingerprint ip
    source sources origin dataset datasets split subset config license licence url urls uri link links path file files
    filename repo repository website commit revision version language languages lang locale country
    score scores rating ratings rank reward rewards weight count length tokens stats
    model models generator annotator annotators author authors username created updated date time timestamp
"""
_ORIGINS = frozenset(_ORIGIN_WORDS.split())
"""Last words of names for the origin of a row or of a part of it: `source`, `system_prompt_id`, `avatarUrl`."""
_KIND_WORDS = """
    category categories topic topics subtopic tag tags label labels type types kind class domain domains subject
    level difficulty quality capability state status flag flags toxic toxicity redacted moderation detoxify
    metadata meta usage rubric rubrics
"""
_KINDS = frozenset(_KIND_WORDS.split())
"""Last words of names for the kind of a row, unless a word of `_SPEAKERS` precedes them: `system_tag`."""
_SPEAKERS = frozenset(("system", "prompt", "instruction", "instructions", "message", "assistant", "user", "persona"))
METADATA = _ORIGINS | _KINDS
"""From the columns of ultrachat_200k, smoltalk, tulu-3-sft-mixture, OpenOrca, SlimOrca, OpenHermes-2.5, Dolly,
no_robots, oasst2, Multifaceted-Collection, UltraFeedback, MetaMathQA, WildChat and BiGGen-Bench."""

_METADATA_NAMES = frozenset(
    ("preference_set", "pressure", "original_question", "sysgen", "gen_input_configs", "header")
)
"""Complete names: of Multifaceted-Collection, MetaMathQA, SYSGEN's rows, Magpie, WildChat (headers of requests)."""

_CONTENT_NAMES = """
    prompt user_prompt instruction completion output question query answer response
    input context history chosen rejected custom_instructions instructions system system_prompt system_message
    system_instruction system_content developer_message tools functions available_tools
    content value thinking reasoning reasoning_content tool_calls function_call args arguments parameters refusal
"""
CONTENT = frozenset(_CONTENT_NAMES.split())
"""Names of content, however short it is: those that some format or message reads, and similar ones."""

_SETTINGS = {name: frozenset(("on", "off", "true", "false", "auto", "none")) for name in ("reasoning", "thinking")}
"""Texts that are settings, not content: Nemotron's `reasoning: "off"`."""
_SWITCH_WORDS = frozenset(("mask", "masked", "loss", "train", "trainable", "training", "supervised", "ignore"))
_PREAMBLE = re.compile(r"Below is an instruction that describes a task.*?\b(?:request|instruction)\.", re.DOTALL)
"""The sentences that Alpaca's rendered prompts begin with."""

WIDE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Character ranges of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""

_WORDS = 3
_WIDE_CHARACTERS = 6
_LONGEST_ID = 64
_WORD = re.compile(r"\S*[^\W\d_]\S*")
_WIDE = re.compile(f"[{WIDE}]")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_IDS = re.compile(r"(?:[a-z][a-z0-9+.-]*://|/|\./|~/|[A-Za-z]:\\)\S+|[0-9a-fA-F-]+")
"""Addresses, paths and digests, which may be longer than 64 characters."""


def collect(unread: Unread, name: str, value: Any) -> None:
    """Add a value under its name, unless it is blank."""
    if not is_blank(value):
        unread.setdefault(name, []).append(value)


def is_prose(text: str) -> bool:
    """Return whether a text is longer than an id: 3 words, 6 characters of a script without spaces, or 65 characters.

    | text                                  | prose                         |
    |---------------------------------------|-------------------------------|
    | `flan.2382`, `Open domain QA`         | no, yes (so `category` is metadata) |
    | `Paris`, `2024-05-01 10:00:00`        | no                            |
    | `Answer in capital letters`           | yes                           |
    | `請用大寫字母回答`                        | yes                           |
    | `https://example.org/a/very/long/...` | no, however long it is        |
    """
    text = text.strip()
    if len(_WORD.findall(text)) >= _WORDS or len(_WIDE.findall(text)) >= _WIDE_CHARACTERS:
        return True
    return len(text) > _LONGEST_ID and not _IDS.fullmatch(text)


@lru_cache(maxsize=4096)
def is_metadata(name: str) -> bool:
    """Return whether a column, or the key in `messages[].key`, is one of metadata."""
    words = _words(name)
    if _last_part(name) in _METADATA_NAMES or not words:
        return bool(words)
    *before, last = words
    return last in _ORIGINS or (_SPEAKERS.isdisjoint(before) and (last in _KINDS or (last == "name" and bool(before))))


@lru_cache(maxsize=4096)
def is_switch(name: str) -> bool:
    """Return whether a name is that of a loss switch: `loss_mask`, `do_train`, `messages[].masked`."""
    return not _SWITCH_WORDS.isdisjoint(_words(name))


def find_lost_text(name: str, values: Sequence[Any], texts: Sequence[str]) -> str | None:
    """Return the first text of these unread values that is content and is not in the conversation, or None.

    `texts`: those of the conversation. Truth values under the name of a loss switch count too, as they decide what is
    trained; they are returned as JSON.
    """
    if is_switch(name):
        for value in values:
            if _is_truth_value(value):
                return json.dumps(value)
    if is_metadata(name):
        return None
    is_content_name, settings = _last_part(name) in CONTENT, _SETTINGS.get(name, ())
    for text in iter_texts(values):
        is_content = is_prose(text) or (is_content_name and text.strip().lower() not in settings)
        if is_content and not _is_in_conversation(text.strip(), texts):
            return text
    return None


def _is_truth_value(value: Any) -> bool:
    """Return whether a value is true, false, 1, 0, or a list of these."""
    if isinstance(value, list | tuple):
        return bool(value) and all(map(_is_truth_value, value))
    return isinstance(value, bool | int) and value in (0, 1)


def iter_texts(value: Any) -> Iterator[str]:
    """Yield every text in lists and objects that is not blank, except under names of metadata."""
    if isinstance(value, str):
        if value.strip():
            yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if not (isinstance(key, str) and is_metadata(key)):
                yield from iter_texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from iter_texts(item)


def _is_in_conversation(text: str, texts: Sequence[str]) -> bool:
    """Return whether the conversation holds a text, or the text the complete conversation and no prose beside it."""
    if any(text in other for other in texts):
        return True
    lines = {line.strip() for other in texts for line in other.splitlines()} - {""}
    if not lines or not all(line in text for line in lines):
        return False
    rest = _PREAMBLE.sub("", text)
    for line in sorted(lines, key=len, reverse=True):
        rest = rest.replace(line, "\n")
    return not any(map(is_prose, rest.splitlines()))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _PARTS.findall(_last_part(name))]


def _last_part(name: str) -> str:
    return name.rpartition(".")[2] if "." in name else name
