"""Which server is asked, how its answers are drawn and in which files the rows go: sections of every configuration
that asks a model."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from train.llm.journal import Decoding
from train.llm.server import Server
from train.recipe import Section, Text
from train.recipe_document import Document


class ServerSection(Section):
    """One OpenAI-compatible server."""

    base_url: Text
    """Its address, which mostly ends in /v1: http://localhost:8000/v1."""
    concurrency: int = Field(default=64, ge=1)
    """How many requests it gets at once, at most; fewer while it objects."""
    key_variable: Text | None = None
    """The environment variable that holds its key; null = none, but for OpenAI's own server OPENAI_API_KEY."""

    def server(self) -> Server:
        """As the client takes it."""
        return Server(self.base_url, self.concurrency, self.key_variable)


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
    """What else goes into a request as it stands, such as top_k or chat_template_kwargs. A model that reasons first
    does without where its template can be told so, as Qwen3's by {chat_template_kwargs: {enable_thinking: false}}; else
    give it tokens enough. What it writes in <think> is taken out and counted."""

    def decoding(self) -> Decoding:
        """As the client takes it."""
        return Decoding(self.max_tokens, self.temperature, self.top_p, self.seed, (), self.extra)


class OutputSection(Section):
    """What is written."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    """jsonl = one file, each row there as soon as it is final; parquet = files of `rows_per_file` rows."""
    rows_per_file: int = Field(default=10_000, ge=1)
    """Rows of a parquet file."""


_NOT_IN_EXTRA = {
    "model": "the run itself sets it",
    "messages": "the run itself sets them",
    "stream": "answers are taken whole and one at a time",
    "stream_options": "answers are taken whole and one at a time",
    "n": "answers are taken whole and one at a time",
    "max_completion_tokens": "write `max_tokens` of the stage, and servers get it by the name they know",
}


def refuse_in_extra(document: Document, stage: str) -> None:
    """Note what would undo the request that it goes into, or can't be sent."""
    extra = document.section(stage).get("extra")
    if not isinstance(extra, dict):
        return
    for name in extra:
        path = (stage, "extra", name)
        if name in _NOT_IN_EXTRA:
            document.fault(path, f"{_NOT_IN_EXTRA[name]}.")
        elif name in StageSection.model_fields:
            document.fault(path, f"not set here: write `{stage}.{name}`.")
    try:
        json.dumps(extra, allow_nan=False)
    except ValueError:
        document.fault((stage, "extra"), "holds a number that JSON can't (.inf or .nan).")


def open_settings(path: str | Path, overrides: Sequence[str], stages: Iterable[str]) -> Document:
    """The file of a configuration that asks a model, with `key=value` overrides and the faults of its stages noted."""
    document = Document(Path(path), keys=("model", "servers", "data", "output_dir"))
    for order, override in enumerate(overrides):
        document.override(override, order)
    document.refuse_secrets()
    for stage in stages:
        refuse_in_extra(document, stage)
    return document
