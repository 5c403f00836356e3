"""Conversations -> token ids and labels, whole batches at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

from transformers import PreTrainedTokenizerBase

from train.data.formats import Conversation, RowFault
from train.data.loss_mask import Encoded, Rendering, check_trainable, label, offset_tokenizer, render_spans

BATCH = 1_000
"""Rows tokenized in one call: enough for all cores, little to hold."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Conversation],
    train_on: Literal["assistant", "last"],
) -> Iterator[tuple[Conversation, Encoded | RowFault]]:
    """Each conversation in its order, encoded, or with the fault that keeps it from being trained.

    Raises UserError where the tokenizer or its template can't be trained with at all.
    """
    check_trainable(tokenizer)
    backend = offset_tokenizer(tokenizer)
    remaining = iter(conversations)
    while batch := list(islice(remaining, BATCH)):
        renderings: list[Rendering | RowFault] = []
        for conversation in batch:
            try:
                renderings.append(render_spans(tokenizer, conversation.messages, conversation.tools, train_on))
            except RowFault as fault:
                renderings.append(fault)
        texts = [rendering.text for rendering in renderings if isinstance(rendering, Rendering)]
        encodings = iter(backend.encode_batch(texts, add_special_tokens=False))
        for conversation, rendering in zip(batch, renderings, strict=True):
            if isinstance(rendering, RowFault):
                yield conversation, rendering
                continue
            try:
                yield conversation, label(backend, rendering, next(encodings))
            except RowFault as fault:
                yield conversation, fault
