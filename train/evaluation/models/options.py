"""Who answers: a checkpoint or a served model, and the options of a command that say so."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from train.cli import json_object, positive_int
from train.errors import UserError
from train.llm.options import add_wait_for_server
from train.storage.local_paths import parse_path_or_id

if TYPE_CHECKING:
    from train.llm.server import Server


@dataclass(frozen=True)
class LocalModel:
    """A model on the disk or on the hub, whole or an adapter, and what it runs in.

    `template`, `system_role`: as a recipe's `chat` has them. `dtype`: None = bfloat16 on a GPU, float32 on a CPU.
    `batch_size`: answers at a time (vllm sees to that itself).
    """

    model: str
    template: str | None = None
    system_role: Literal["native", "merge_into_user", "turn"] = "native"
    engine: Literal["transformers", "vllm"] = "transformers"
    dtype: str | None = None
    batch_size: int = 16


@dataclass(frozen=True)
class ServedModel:
    """A model behind OpenAI-compatible servers, by the name that they know it by.

    `system_role`: native = as the server's template has it; merge_into_user = in the first user turn, before its text
    and a blank line, for a model without a system role whose template would refuse or drop it.
    """

    model: str
    servers: "tuple[Server, ...]"
    system_role: Literal["native", "merge_into_user"] = "native"


def add_respondent(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who answers."""
    who = parser.add_argument_group("who answers")
    who.add_argument(
        "--model",
        type=parse_path_or_id,
        required=True,
        help="folder or hub id of a model or an adapter; with --server its name",
    )
    who.add_argument("--server", action="append", default=[], metavar="URL", help="ask it there: http://host:8000/v1")
    who.add_argument(
        "--concurrency", type=positive_int, default=64, help="requests at once to each server (default 64)"
    )
    who.add_argument("--key-variable", metavar="NAME", help="the environment variable that holds the server's key")
    add_wait_for_server(who)
    who.add_argument(
        "--extra",
        type=json_object,
        default={},
        metavar="JSON",
        help="more fields of each request; null = that one is not sent",
    )
    who.add_argument(
        "--template", type=parse_path_or_id, help="as chat.template of a recipe (default: the model's own)"
    )
    who.add_argument(
        "--system-role",
        default="native",
        choices=("native", "merge_into_user", "turn"),
        help="as chat.system_role of a recipe (default native: a model that we trained has its policy in its template)",
    )
    who.add_argument(
        "--engine",
        default="transformers",
        choices=("transformers", "vllm"),
        help="what runs a model that is no server's (default transformers); vllm is started for it, and ended",
    )
    who.add_argument("--dtype", choices=("float32", "bfloat16"), help="default float32 on a CPU, bfloat16 on a GPU")
    who.add_argument(
        "--batch-size", type=positive_int, default=16, help="answers at a time, without a server (default 16)"
    )


def refuse_extra_fields(option: str, extra: Mapping[str, Any], own: Mapping[str, tuple[str, Any]]) -> None:
    """Raise UserError for a request field that `option` can't set.

    `own`: the option and value of each field that has an option of its own.
    """
    from train.datagen.config import faults_in_extra  # which takes a while to import

    for name, why in faults_in_extra(extra, {field: value for field, (_, value) in own.items()}):
        setting = own[name][0] if name in own else ""
        key_variable = option.replace("extra", "key-variable")
        raise UserError(f"{option}: `{name}`: {why.format(setting=setting, key_variable=key_variable)}")


def server_options(prefix: str = "") -> dict[str, str]:
    """What errors about a server say of a configuration's keys, and the same of the options --`prefix`server and so on.

    For `naming`.
    """
    said = (
        "it as key_variable",
        "base_url is probably wrong",
        "Is base_url right",
        "base_url '",
        "as base_url",
        "is base_url right",
    )
    return {
        words: words.replace("base_url", f"--{prefix}server").replace("key_variable", f"--{prefix}key-variable")
        for words in said
    }


def respondent_of(options: argparse.Namespace) -> LocalModel | ServedModel:
    """Who answers, by the options of `add_respondent`. Raises UserError for options that contradict."""
    if not options.server:
        return LocalModel(
            options.model,
            options.template,
            options.system_role,
            options.engine,
            options.dtype,
            options.batch_size,
        )
    for name in ("template", "dtype"):
        if getattr(options, name):
            raise UserError(f"--{name}: that is the server's affair; leave it out, or leave --server out.")
    if options.engine != "transformers":
        raise UserError(f"--engine {options.engine}: the server runs the model; leave it out, or leave --server out.")
    if options.system_role == "turn":
        raise UserError("--system-role turn: a server's template is its own. Allowed with --server: native, "
                        "merge_into_user.")  # fmt: skip
    from train.llm.server import Server  # which takes a second to import

    servers = tuple(Server(url, options.concurrency, options.key_variable) for url in options.server)
    return ServedModel(options.model, servers, options.system_role)
