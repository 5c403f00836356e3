"""Which tokens are trained: the text that the template marks as the model's, and the proof that it is just that."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from train.data.chat_template import has_generation_marks, render
from train.data.formats import RowFault
from train.errors import UserError

NOT_TRAINED = -100
"""The label that PyTorch's cross entropy ignores."""

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One training row: token ids, and as long a list of labels, `NOT_TRAINED` where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, with the character spans that the model is trained to write."""

    text: str
    spans: list[Span]


def check_trainable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError where the tokenizer or its template can't say which tokens are the model's."""
    if not tokenizer.is_fast:
        raise UserError(
            f"model.name_or_path: the tokenizer of {tokenizer.name_or_path} is a slow one, which can't tell where its "
            "tokens stand in the text. Use a model that ships a tokenizer.json."
        )
    if not has_generation_marks(str(tokenizer.chat_template)):
        raise UserError(
            "chat.template: the template has no {% generation %} marks, so nothing says which of its text the model "
            "writes. Put {% generation %} and {% endgeneration %} around the assistant's content and its end token, "
            "or name one of the templates that ship here."
        )


def render_spans(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    train_on: Literal["assistant", "last"],
) -> Rendering:
    """Render one conversation and find the spans to train, each verified against the message it comes from.

    A message with `train: false` is part of the conversation and not trained.

    Raises RowFault where the template refuses the conversation, loses a message or marks something else.
    """
    try:
        text, spans = render(tokenizer, messages, tools)
    except jinja2.TemplateError as fault:
        raise RowFault("refused by the template", str(fault)) from fault
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(spans) != len(answers):
        raise RowFault("not marked by the template", f"{len(answers)} assistant turns, {len(spans)} marked")
    for answer, (start, end) in zip(answers, spans, strict=True):
        content = (answer.get("content") or "").strip()
        place = text.rfind(content, start, end) if content else start
        if place < 0:
            raise RowFault("answer lost by the template", f"not in what it marks: {content[:60]!r}")
        if not text[place + len(content) : end].strip():
            raise RowFault("end token not marked by the template", f"nothing is trained after {content[-60:]!r}")
    unmarked = [text[before:start] for before, start in _gaps(spans, len(text))]
    for message in messages:
        if message["role"] != "assistant" and not any(message["content"].strip() in part for part in unmarked):
            raise RowFault(f"{message['role']} message lost by the template", f"{message['content'][:60]!r}")
    wanted = [span for answer, span in zip(answers, spans, strict=True) if answer.get("train", True)]
    return Rendering(text, wanted[-1:] if train_on == "last" else wanted)


def _gaps(spans: list[Span], length: int) -> list[Span]:
    """What lies before, between and after the spans."""
    starts = [0, *(end for _, end in spans)]
    ends = [*(start for start, _ in spans), length]
    return list(zip(starts, ends, strict=True))


def offset_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of the tokenizer's backend that adds nothing, cuts nothing and tells each token's whole place in the text.

    A post-processor would add special tokens that the template has written already, and byte-level ones trim leading
    blanks from the offsets.
    """
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


def label(backend: Tokenizer, rendering: Rendering, encoding: Encoding) -> Encoded:
    """Labels for one tokenized rendering.

    Where a token reaches over the start of a span (a prompt that ends and an answer that begins with a line break),
    the model could never write it, as the prompt is tokenized alone at inference: prompt and answer are tokenized
    apart then, as they will be there.
    Raises RowFault where that can't be done exactly, or where nothing is left to train.
    """
    places = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    if _straddled(places, rendering.spans):
        return _label_in_parts(backend, rendering)
    ids = np.asarray(encoding.ids, dtype=np.int64)
    trained = np.zeros(len(ids), dtype=bool)
    for start, end in rendering.spans:
        trained |= (places[:, 0] >= start) & (places[:, 1] <= end)
    if not trained.any():
        raise RowFault("nothing to train", "no token of an answer")
    return Encoded(ids.tolist(), np.where(trained, ids, NOT_TRAINED).tolist())


def _straddled(places: NDArray[np.int64], spans: list[Span]) -> bool:
    """Whether a token lies across the border of a span. `places`: (tokens, 2), character start and end of each."""
    borders = np.asarray(spans, dtype=np.int64).reshape(-1)
    return bool(((places[:, :1] < borders) & (borders < places[:, 1:])).any())


def _label_in_parts(backend: Tokenizer, rendering: Rendering) -> Encoded:
    ids: list[int] = []
    labels: list[int] = []
    for number, (before, start) in enumerate(_gaps(rendering.spans, len(rendering.text))):
        prompt = backend.encode(rendering.text[before:start], add_special_tokens=False).ids
        ids += prompt
        labels += [NOT_TRAINED] * len(prompt)
        if number < len(rendering.spans):
            answer = backend.encode(rendering.text[slice(*rendering.spans[number])], add_special_tokens=False).ids
            ids += answer
            labels += answer
    if backend.decode(ids, skip_special_tokens=False) != rendering.text:
        raise RowFault("a token joins prompt and answer", "and this tokenizer can't encode the two apart exactly")
    return Encoded(ids, labels)


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    *,
    train_on: Literal["assistant", "last"] = "assistant",
    system_role: Literal["native"] = "native",
    tools: list[dict[str, Any]] | None = None,
) -> list[Encoded]:
    """Token ids and labels of one conversation under the tokenizer's own chat template.

    `train_on`: every assistant turn, or the last one only; its end token is trained with it.
    Raises RowFault where this conversation can't be trained, UserError where the tokenizer or template can't be.
    """
    check_trainable(tokenizer)
    backend = offset_tokenizer(tokenizer)
    rendering = render_spans(tokenizer, messages, tools, train_on)
    return [label(backend, rendering, backend.encode(rendering.text, add_special_tokens=False))]
