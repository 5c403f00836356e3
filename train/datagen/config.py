"""Which server is asked, how its answers are drawn and in which files the rows go: sections of every configuration
that asks a model."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal

from pydantic import Field

from train.llm.request import Decoding
from train.llm.server import Server
from train.recipe import Section, Text
from train.recipe.yaml_document import SECRET, Document


class ServerSection(Section):
    """One OpenAI-compatible server."""

    base_url: Text
    """Its address, which mostly ends in /v1: http://localhost:8000/v1."""
    concurrency: int = Field(default=64, ge=1)
    """How many requests it gets at once, at most; fewer while it objects."""
    key_variable: Text | None = None
    """The environment variable that holds its key; null = none, but for OpenAI's own server OPENAI_API_KEY."""
    stream: bool = False
    """Ask for answers as a stream of events, for a server that gives no others. One that says so in an error gets such
    requests from then on without it."""

    def server(self) -> Server:
        """As the client takes it."""
        return Server(self.base_url, self.concurrency, self.key_variable, self.stream)


class StageSection(Section):
    """How the answers of one stage are drawn, in the names of the OpenAI API."""

    max_tokens: int = Field(gt=0)
    """Most tokens of an answer. To raise it asks again what was cut, and that alone."""
    temperature: float | None = Field(default=0.7, ge=0)
    """null = the server's own."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """null = the server's own; the paper states none."""
    seed: int | None = None
    """Sent with each request (a further try gets the next number); null = none is sent."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Other fields of a request, sent as they are: top_k, chat_template_kwargs, ...; null = that field is not sent.
    max_completion_tokens takes the place of `max_tokens`; {max_tokens: null} alone sends no limit. What has a key of
    its own is set there. A model that reasons first does without where it can be told so, as Qwen3 by
    {chat_template_kwargs: {enable_thinking: false}} (DashScope: {enable_thinking: false}); else give it tokens enough.
    What it writes in <think> is taken out and counted."""

    def decoding(self) -> Decoding:
        """As the client takes it."""
        return Decoding.from_settings(self.max_tokens, self.temperature, self.top_p, self.seed, self.extra)


SystemRole = Literal["native", "merge_into_user"]


class OutputSection(Section):
    """What is written."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    """jsonl = one file, each row there as soon as it is final; parquet = files of `rows_per_file` rows."""
    rows_per_file: int = Field(default=10_000, ge=1)
    """Rows of a parquet file."""


_NOT_IN_EXTRA = {
    "model": "the run itself sets it",
    "messages": "the run itself sets them",
    "stream": "answers are taken whole and one at a time; a server that only streams is asked for a stream by itself",
    "stream_options": "answers are taken whole and one at a time",
    "n": "answers are taken whole and one at a time",
}


def faults_in_extra(extra: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each name in `extra` that can't be there, and why: what would keep answers from being read, or contradicts.

    `own`: the value of each request field that has a setting of its own; `{setting}` in a reason stands for that,
    and `{key_variable}` for the setting that names the variable of a server's key.
    """
    for name, value in extra.items():
        if _holds_secret(name, value):
            yield name, _NO_SECRETS
        elif name in _NOT_IN_EXTRA:
            yield name, f"{_NOT_IN_EXTRA[name]}."
        elif value is not None and own.get(name) is not None:
            yield name, "not set here: write {setting}."
        elif name == "max_completion_tokens" and (type(value) not in (int, NoneType) or value == 0):
            yield name, "must be an integer >= 1, or null."


_NO_SECRETS = (
    "requests hold no secrets here, for they are copied into the output folder and into logs. Set a server's key in "
    "the environment, and name the variable by {key_variable}."
)


def _holds_secret(name: str, value: Any) -> bool:
    """Return whether the name of a request field, or one within its value, is that of a secret."""
    if SECRET.search(name):
        return True
    if isinstance(value, list):
        return any(_holds_secret("", part) for part in value)
    return isinstance(value, Mapping) and any(_holds_secret(str(inner), part) for inner, part in value.items())


def refuse_in_extra(document: Document, stage: str) -> None:
    """Note what `extra` of a stage can't hold."""
    section = document.section(stage)
    extra = section.get("extra")
    if not isinstance(extra, dict):
        return
    own = {name: section.get(name, field.default) for name, field in StageSection.model_fields.items()}
    for name, why in faults_in_extra(extra, own):
        document.add_error(
            (stage, "extra", name), why.format(setting=f"`{stage}.{name}`", key_variable="`servers.N.key_variable`")
        )
    try:
        json.dumps(extra, allow_nan=False)
    except ValueError:
        document.add_error((stage, "extra"), "holds a number that JSON can't (.inf or .nan).")


def open_settings(path: str | Path, overrides: Sequence[str], stages: Iterable[str]) -> Document:
    """The file of a configuration that asks a model, with `key=value` overrides and the faults of its stages noted."""
    document = Document(Path(path), keys=("model", "servers", "data", "output_dir"))
    for order, override in enumerate(overrides):
        document.override(override, order)
    document.refuse_secrets("a server's key in the variable that its `servers.N.key_variable` names; HF_TOKEN")
    for stage in stages:
        refuse_in_extra(document, stage)
    return document
