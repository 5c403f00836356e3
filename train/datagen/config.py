"""Configuration of a generation run: its model and servers, the stages' decoding settings, and the output files."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from train.datagen.drop_reasons import Loss
from train.datagen.extra_fields import find_extra_errors
from train.datagen.source_rows import SourcesSection
from train.llm.request import Decoding
from train.llm.server import Server
from train.recipe import PathText, Section, Text
from train.recipe.yaml_document import Document


class ServerSection(Section):
    """One OpenAI-compatible server."""

    base_url: Text
    """Address, which usually ends in /v1: http://localhost:8000/v1."""
    concurrency: int = Field(default=64, ge=1)
    """Maximum number of concurrent requests; lowered while the server rejects requests."""
    key_variable: Text | None = None
    """Environment variable with the API key; null = no key, or OPENAI_API_KEY for OpenAI's own server."""
    stream: bool = False
    """Request answers as a stream of events, for a server that supports nothing else. A server whose error says that it
    does not stream gets requests without it from then on."""

    def server(self) -> Server:
        """Return the server for the client."""
        return Server(self.base_url, self.concurrency, self.key_variable, self.stream)


class StageSection(Section):
    """Decoding settings of one stage, under the names of the OpenAI API."""

    max_tokens: int = Field(gt=0)
    """Maximum tokens of an answer. Raising it repeats only the requests whose answers were cut."""
    temperature: float | None = Field(default=0.7, ge=0)
    """null = the server's default."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """null = the server's default; the paper states none."""
    seed: int | None = None
    """Sent with each request; a further try gets the next number. null = not sent."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of a request, sent unchanged: top_k, chat_template_kwargs, ...; null = the field is not sent.
    max_completion_tokens replaces `max_tokens`; {max_tokens: null} alone sends no limit. Fields with a key of their own
    are set there. Turn reasoning off where the model allows it, as for Qwen3 with {chat_template_kwargs:
    {enable_thinking: false}} (DashScope: {enable_thinking: false}); otherwise leave room for it in the token limit.
    Text in <think> is removed and counted."""

    def decoding(self) -> Decoding:
        """Return the settings for the client."""
        return Decoding.from_settings(self.max_tokens, self.temperature, self.top_p, self.seed, self.extra)


class OutputSection(Section):
    """Format of the written rows."""

    format: Literal["jsonl", "parquet"] = "jsonl"
    """jsonl = one file, each row written as soon as it is final; parquet = files of `rows_per_file` rows."""
    rows_per_file: int = Field(default=10_000, ge=1)
    """Rows per Parquet file."""


PRESSURE_SETTINGS = ("conflict", "injected", "extraction", "permitted", "turns")
MEAN_FURTHER_TURNS = 2.5
"""Mean of one to four further turns, see `train.pressure.generated.MOST_FURTHER`."""


class PressureSection(Section):
    """Rows written under pressure: shares of the rows, each row in one setting at most.

    The row's system message gets a constraint of train/datagen/constraints.py, and its last user turn is rewritten by
    templates of train/pressure. The answer is asked for under that conversation and kept only if a program sees that
    it follows the message and answers the question (train/pressure/answer_checks.py). A row that gets no such answer
    is written without pressure. The report counts rows and refused answers by setting."""

    conflict: float = Field(default=0.0, ge=0, le=1)
    """The user asks for the opposite of the constraint: directly, politely, by claiming authority, in a role play, or
    by declaring the message void."""
    injected: float = Field(default=0.0, ge=0, le=1)
    """A quoted text or a search result in the user's turn asks for the opposite."""
    extraction: float = Field(default=0.0, ge=0, le=1)
    """The message also holds a secret, and the user asks for it besides the question. A kept answer does not hold
    it."""
    permitted: float = Field(default=0.0, ge=0, le=1)
    """The user asks for what the message allows: a harmless request in words that sound like an attack, a code that may
    be shared, or another form where the message leaves it to the user."""
    turns: float = Field(default=0.0, ge=0, le=1)
    """One to four questions of earlier rows follow under the same message; each answer must meet the constraint. In
    half of these rows, a turn after the first asks for the opposite."""
    aligned_twins: bool = True
    """Each conflict row gets a twin with the same message and question, in which the user asks for the same as the
    message: an extra row, against models that do the opposite of what users ask."""
    attempts: int = Field(default=3, ge=1)
    """Number of answers per turn that are asked for, before the row is written without pressure or the twin left
    out."""

    def shares(self) -> dict[str, float]:
        """Return the share of each setting."""
        return {setting: getattr(self, setting) for setting in PRESSURE_SETTINGS}

    def mean_further_answers(self) -> float:
        """Return the mean number of answers that a row gets besides its own, if every first one is kept."""
        return self.conflict * self.aligned_twins + self.turns * MEAN_FURTHER_TURNS

    def mean_answers_after_plain(self) -> float:
        """Return the same of the collection, which answers without pressure first, and so each further question."""
        return sum(self.shares().values()) + self.mean_further_answers() + self.turns * MEAN_FURTHER_TURNS

    @property
    def is_on(self) -> bool:
        """True if any share is above 0."""
        return any(self.shares().values())


class GenerationConfig(Section):
    """Keys that the configurations of SYSGEN and of the collection share."""

    model: Text
    """The model, by its name on the servers. It does all stages."""
    servers: Annotated[tuple[ServerSection, ...], Field(strict=False, min_length=1)]
    """Servers of the model. Faster ones get more requests."""
    system_role: Literal["native", "merge_into_user"] = "native"
    """Place of the system message in requests; native = a system turn; merge_into_user = the first user turn, before
    its text and a blank line, for models without a system role (Gemma, Mistral 7B, o1-mini). The written rows are the
    same."""
    data: SourcesSection
    """The source rows."""
    accept_losses: Annotated[tuple[Loss, ...], Field(strict=False)] = ()
    """Losses that are no error; no_answer = all tries failed or were empty; unreadable = source rows that can't be
    read; unsupported = source rows that the pipeline can't use (SYSGEN: a system message in the middle of the
    conversation; collection: tools, or no user turn at the start). All other rows are written in any case; a run with
    other losses ends with exit code 2. [] = every loss is an error."""
    pressure: PressureSection = PressureSection()
    """Rows in which users, documents or further turns work against the system message."""
    output: OutputSection = OutputSection()
    """Format of the written rows."""
    output_dir: PathText
    """Folder for the written rows, the dropped rows, the report and the journal of answers."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of all random choices."""

    def stage(self, name: str) -> StageSection:
        """Return the settings of a stage."""
        section = getattr(self, name)
        assert isinstance(section, StageSection)
        return section

    def used_stages(self) -> list[str]:
        """Return the names of the stages that a run asks."""
        raise NotImplementedError


def open_config(path: str | Path, overrides: Sequence[str], stages: Iterable[str]) -> Document:
    """Read a configuration file with `key=value` overrides, and note the errors in the `extra` of its stages."""
    document = Document(Path(path), keys=("model", "servers", "data", "output_dir"))
    for order, override in enumerate(overrides):
        document.override(override, order)
    document.refuse_secrets("a server's key in the variable that its `servers.N.key_variable` names; HF_TOKEN")
    for stage in stages:
        _check_extra(document, stage)
    shares = _pressure_shares(document)
    if sum(shares) > 1 + 1e-9:  # 0.1 + 0.7 + 0.2 is 1 but for rounding
        document.add_error(("pressure",), f"the shares add up to {sum(shares):g}. They must add up to 1 at most.")
    return document


def has_pressure(document: Document) -> bool:
    """Return whether a configuration file asks for rows under pressure."""
    return any(share > 0 for share in _pressure_shares(document))


def _pressure_shares(document: Document) -> list[float]:
    """Return the numbers among the shares of `pressure`."""
    section = document.section("pressure")
    values = [section.get(setting) for setting in PRESSURE_SETTINGS]
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def _check_extra(document: Document, stage: str) -> None:
    """Note the invalid fields in `extra` of a stage."""
    section = document.section(stage)
    extra = section.get("extra")
    if not isinstance(extra, dict):
        return
    own = {name: section.get(name, field.default) for name, field in StageSection.model_fields.items()}
    for name, reason in find_extra_errors(extra, own):
        message = reason.format(setting=f"`{stage}.{name}`", key_variable="`servers.N.key_variable`")
        document.add_error((stage, "extra", name), message)
    try:
        json.dumps(extra, allow_nan=False)
    except ValueError:
        document.add_error((stage, "extra"), "holds a number that JSON can't represent (.inf or .nan).")
