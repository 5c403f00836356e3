"""The model under evaluation: the options that name it, and the two kinds of models that they name."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from train.errors import UserError
from train.llm.options import WAIT_FOR_SERVER
from train.recipe import PathText, Section, Text

if TYPE_CHECKING:
    from train.llm.server import Server

SystemRole = Literal["native", "merge_into_user", "turn"]


@dataclass(frozen=True)
class LocalModel:
    """A complete model or an adapter on disk or on the hub, and the engine that runs it.

    - `template`, `system_role`: as in the `chat` section of a recipe.
    - `dtype`: None = bfloat16 on a GPU, float32 on a CPU.
    - `batch_size`: answers generated at a time; vLLM chooses its own.
    """

    model: str
    template: str | None = None
    system_role: SystemRole = "native"
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: str | None = None
    batch_size: int = 16


@dataclass(frozen=True)
class ServedModel:
    """A model behind OpenAI-compatible servers, by the name that they know it by.

    `system_role`: native = the server's template handles it; merge_into_user = before the first user turn and a blank
    line, for a model without a system role whose template would refuse or drop the message.
    """

    model: str
    servers: "tuple[Server, ...]"
    system_role: Literal["native", "merge_into_user"] = "native"


class ModelOptions(Section):
    """The model under evaluation."""

    model: PathText
    """Folder or hub id of a model or an adapter; with `server` the name that the server knows."""
    server: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Addresses of OpenAI-compatible servers that answer, such as http://host:8000/v1."""
    concurrency: int = Field(default=64, ge=1)
    """Simultaneous requests to each server."""
    key_variable: Text | None = None
    """Environment variable that holds the server's key."""
    wait_for_server: float = Field(default=WAIT_FOR_SERVER, ge=0)
    """Time to wait at the start for a server that cannot be reached: seconds, on the command line also 10m or
    1h30m. Once reached, a server is waited for without a limit."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """More fields of each request, as a JSON object; null = that field is not sent."""
    template: PathText | None = None
    """As `chat.template` of a recipe; null = the model's own."""
    system_role: SystemRole = "native"
    """As `chat.system_role` of a recipe. A model trained here has its policy in its template: native."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that runs a local model; vllm is started for the run and stopped after it."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of a local model; null = float32 on a CPU, bfloat16 on a GPU."""
    batch_size: int = Field(default=16, ge=1)
    """Answers generated at a time by a local model."""

    def local_or_served(self) -> LocalModel | ServedModel:
        """Return the model that these options name. Raises UserError for options that contradict each other."""
        if not self.server:
            return LocalModel(self.model, self.template, self.system_role, self.engine, self.dtype, self.batch_size)
        for name in ("template", "dtype"):
            if getattr(self, name):
                raise UserError(f"--{name}: the server decides that. Leave it out, or leave --server out.")
        if self.engine != "transformers":
            raise UserError(f"--engine {self.engine}: the server runs the model. Leave it out, or leave --server out.")
        if self.system_role == "turn":
            raise UserError(
                "--system-role turn: the server applies its own template. Allowed with --server: native, "
                "merge_into_user."
            )
        from train.llm.server import Server  # which takes a second to import

        servers = tuple(Server(url, self.concurrency, self.key_variable) for url in self.server)
        return ServedModel(self.model, servers, self.system_role)


COMMON = ("model", "server", "template", "system_role", "engine", "batch_size")
"""The options of a model that --help of a command with many options shows."""


def refuse_extra_fields(option: str, extra: Mapping[str, Any], own: Mapping[str, tuple[str, Any]]) -> None:
    """Raise UserError for a request field that `option` cannot set.

    `own`: the option and the value of each field that has an option of its own.
    """
    from train.datagen.extra_fields import find_extra_errors

    for name, reason in find_extra_errors(extra, {field: value for field, (_, value) in own.items()}):
        setting = own[name][0] if name in own else ""
        key_variable = option.replace("extra", "key-variable")
        raise UserError(f"{option}: `{name}`: {reason.format(setting=setting, key_variable=key_variable)}")
    try:
        json.dumps(extra, allow_nan=False)
    except ValueError:
        raise UserError(f"{option}: holds a number that JSON cannot represent (.inf or .nan).") from None


def server_options(prefix: str = "") -> dict[str, str]:
    """Map phrases of server errors about keys of a configuration to the same about --`prefix`server and so on.

    For `train.errors.replace_in_errors`.
    """
    phrases = (
        "it as key_variable",
        "base_url is probably wrong",
        "Is base_url right",
        "base_url '",
        "as base_url",
        "is base_url right",
    )
    return {
        phrase: phrase.replace("base_url", f"--{prefix}server").replace("key_variable", f"--{prefix}key-variable")
        for phrase in phrases
    }
