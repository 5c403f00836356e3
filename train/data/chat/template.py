"""Which chat template a run uses, how a conversation is rendered with it, and the form it is saved in."""

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
    """Whether `template` says with `{% generation %}` what the model writes."""
    return _GENERATION_TAG.search(template) is not None


def without_generation_marks(template: str) -> str:
    """The template as it is served: llama.cpp and others don't know the tag `{% generation %}`.

    A comment takes the tag's place, as it trims the white space around it in the same way.
    """
    return _GENERATION_TAG.sub(r"{#\1 \2#}", template)


@lru_cache(maxsize=16)
def variables_of(template: str) -> frozenset[str]:
    """Return the names of the variables that a template takes from outside."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(_GENERATION_TAG.sub("", template))))


def named_templates() -> list[str]:
    """Names that `chat.template` takes besides a path."""
    return sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


_dates: WeakKeyDictionary[PreTrainedTokenizerBase, date] = WeakKeyDictionary()
"""The date that rows are rendered with, for as long as the tokenizer lives."""
_DIRECTIVES = "aAbBcdeDFghHIjklmMnpPrRStTuUVwWxXyYzZ"


def pin_date(tokenizer: PreTrainedTokenizerBase, day: date) -> None:
    """Have rows rendered with this date, whenever that is: a run keeps the date of its start (`dated_template`)."""
    _dates[tokenizer] = day


def date_of(tokenizer: PreTrainedTokenizerBase) -> date | None:
    """Return the date that rows are rendered with, or None where the template doesn't ask for it."""
    return _dates.get(tokenizer, date.today()) if "strftime_now" in str(tokenizer.chat_template) else None


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template with the pinned date in the place of the clock.

    transformers (5.23) offers the clock as the global `strftime_now` and passes a template plain data alone, no
    function. A macro of the same name hides the global. The line break after it belongs to its tag (trim_blocks).
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
"""Where the template came from that `use_template` put into a tokenizer, for as long as the tokenizer lives."""


def template_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's template in an error: by its file, or by the model's name where it is the tokenizer's own."""
    file = _files.get(tokenizer)
    return f"the template {file}" if file else f"the template of {tokenizer.name_or_path}"


def use_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> str:
    """Put the template called `name` into the tokenizer, with its generation marks, and say in words which one it is.

    `name` is one of `named_templates()`, a path to a .jinja file, one of several templates that the tokenizer has by
    name (Command R: default, tool_use, rag), or None for the tokenizer's own: of several `default`, as transformers
    does. A run uses one template, and the saved tokenizer has that one alone, so serving renders what was trained.
    Raises UserError where there is no such template, where it can't be read or run, or where it writes control tokens
    that the tokenizer lacks.
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
            "not have as a token, so it would fall into pieces. Choose a template made for this model."
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
    """Text of one conversation under the tokenizer's template, and the character spans inside `{% generation %}`.

    A template without such marks gives no spans.
    Raises jinja2.TemplateError where the template refuses the conversation.
    """
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=has_generation_marks(str(tokenizer.chat_template)),
        **tokenizer.special_tokens_map,
    )
    return texts[0], [tuple(span) for span in spans[0]] if spans else []
