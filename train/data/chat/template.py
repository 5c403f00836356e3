"""Chat templates: the one that a run uses, its date, and the form in which it is saved."""

import json
import re
from datetime import date, datetime, time
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import jinja2.meta
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from train.errors import UserError

TEMPLATES = Path(__file__).parents[1] / "templates"

_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}")
_CONTROL_TOKEN = re.compile(r"<\|\w+\|>")


def has_generation_marks(template: str) -> bool:
    """Return whether `template` marks what the model writes with `{% generation %}`."""
    return _GENERATION_TAG.search(template) is not None


def without_generation_marks(template: str) -> str:
    """Return the template for serving: llama.cpp and others don't know the tag `{% generation %}`.

    A comment replaces the tag, as it trims the white space around it in the same way.
    """
    return _GENERATION_TAG.sub(r"{#\1 \2#}", template)


@lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset[str]:
    """Return the names of the variables that a template takes as input."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template))))


def named_templates() -> list[str]:
    """Return the names that `chat.template` takes besides a path."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


_dates: WeakKeyDictionary[PreTrainedTokenizerBase, date] = WeakKeyDictionary()
"""Tokenizer -> the date that rows are rendered with, kept while the tokenizer lives."""
_DIRECTIVES = "aAbBcdeDFghHIjklmMnpPrRStTuUVwWxXyYzZ"


def pin_date(tokenizer: PreTrainedTokenizerBase, day: date) -> None:
    """Render rows with this date from now on: a run keeps the date of its start (see `dated_template`)."""
    _dates[tokenizer] = day


def date_of(tokenizer: PreTrainedTokenizerBase) -> date | None:
    """Return the date that rows are rendered with, or None if the template doesn't write it."""
    return _dates.get(tokenizer, date.today()) if "strftime_now" in str(tokenizer.chat_template) else None


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template with the pinned date in place of the clock.

    transformers (5.23) offers the clock as the global function `strftime_now` and passes only plain data to a template,
    no functions. A macro of the same name hides the global. The line break after it belongs to its tag (trim_blocks).
    """
    template, day = str(tokenizer.chat_template), _dates.get(tokenizer)
    if day is None or "strftime_now" not in template:
        return template
    midnight = datetime.combine(day, time())
    codes = [f"-{code}" for code in "deHIjklmMSyU"] + list(_DIRECTIVES)
    filters = "".join(
        f" | replace({json.dumps('%' + code)}, {json.dumps(midnight.strftime('%' + code))})" for code in codes
    )
    return f"{{% macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n{template}"


_files: WeakKeyDictionary[PreTrainedTokenizerBase, str] = WeakKeyDictionary()
"""Tokenizer -> the name of the template that `use_template` put into it, kept while the tokenizer lives."""


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of the tokenizer's template for an error: its file, or the model for the tokenizer's own."""
    file = _files.get(tokenizer)
    return f"the template {file}" if file else f"the template of {tokenizer.name_or_path}"


def use_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Put a template into the tokenizer, with its generation marks, and return its description.

    `name` is one of `named_templates()`, a path to a .jinja file, one of the tokenizer's several named templates
    (Command R: default, tool_use, rag), or None for the tokenizer's own: of several the one called `default`, as in
    transformers. The saved tokenizer has this template alone, so serving renders what was trained.
    Raises UserError if there is no such template, it can't be read or parsed, or it writes control tokens that the
    tokenizer lacks.
    """
    own = tokenizer.chat_template
    several = dict(own) if isinstance(own, dict) else {}
    if name is None or (name in several and name not in named_templates()):
        if name is None and several and "default" not in several:
            raise UserError(
                f"chat.template: the tokenizer of {tokenizer.name_or_path} has several templates and none is called "
                f"default: {', '.join(several)}. Write the name of one."
            )
        if not own:
            raise UserError(
                f"chat.template: the tokenizer of {tokenizer.name_or_path} has no chat template of its own. "
                f"Write one of {', '.join(named_templates())} or the path of a .jinja file."
            )
        _files.pop(tokenizer, None)
        if not several:
            return "the tokenizer's own"
        chosen = name or "default"
        tokenizer.chat_template = several.pop(chosen)
        others = f"; not used: {', '.join(several)} (chat.template: NAME)" if several else ""
        return f"the tokenizer's own {chosen!r}{others}"
    path = TEMPLATES / f"{name}.jinja" if name in named_templates() else Path(name)
    if path.suffix != ".jinja" or not path.is_file():
        raise UserError(
            f"chat.template: there is no template {name!r}. Write one of {', '.join([*named_templates(), *several])}, "
            "the path of a .jinja file, or leave the key out to use the tokenizer's own."
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat.template: {path} can't be read as UTF-8 text: {error}") from error
    vocabulary = tokenizer.get_vocab()
    missing = sorted(token for token in set(_CONTROL_TOKEN.findall(text)) if token not in vocabulary)
    if missing:
        raise UserError(
            f"chat.template: {name} writes {', '.join(missing)}, which the tokenizer of {tokenizer.name_or_path} does "
            "not have as a token, so it would be split into several. Choose a template made for this model."
        )
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION_TAG.sub("", text))
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat.template: {path}, line {error.lineno}: {error.message}") from error
    tokenizer.chat_template = text
    _files[tokenizer] = name
    return name


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation under the tokenizer's template, and the spans inside `{% generation %}`.

    A template without such marks gives no spans.
    Raises jinja2.TemplateError if the template refuses the conversation.
    """
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=has_generation_marks(str(tokenizer.chat_template)),
        **tokenizer.special_tokens_map,
    )
    return texts[0], [tuple(span) for span in spans[0]] if spans else []
