"""Conversations -> token ids and labels, whole batches at a time."""

from collections.abc import Iterable, Iterator
from itertools import islice

from transformers import PreTrainedTokenizerBase

from train.data.control_tokens import ControlTokens, Policy
from train.data.formats import Conversation, Message, RowFault
from train.data.loss_mask import Encoded, Encoder
from train.data.rendering import Tools
from train.data.spans import TrainOn

BATCH = 1_000
"""Conversations tokenized in one call: enough for all cores, little to hold."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Conversation],
    train_on: TrainOn,
    control_tokens_in_text: Policy = "error",
) -> Iterator[tuple[Conversation, list[Encoded] | RowFault]]:
    """Each conversation in its order with its rows, or with the fault that keeps it from being trained.

    Mostly one row; several where the template rewrites earlier turns, so that each needs a render of its own.
    Raises UserError where no answer can be trained under the tokenizer's template at all.
    """
    encoder = Encoder(tokenizer)
    control_tokens = ControlTokens(tokenizer, control_tokens_in_text)
    remaining = iter(conversations)
    while batch := list(islice(remaining, BATCH)):
        cleaned = [_cleaned(conversation, control_tokens) for conversation in batch]
        pairs = [pair for pair in cleaned if not isinstance(pair, RowFault)]
        rows = iter(encoder.encode(pairs, train_on))
        for conversation, pair in zip(batch, cleaned, strict=True):
            yield conversation, pair if isinstance(pair, RowFault) else next(rows)


def _cleaned(conversation: Conversation, control_tokens: ControlTokens) -> tuple[list[Message], Tools] | RowFault:
    try:
        return control_tokens.clean(conversation.messages), control_tokens.clean_tools(conversation.tools)
    except RowFault as fault:
        return fault
