"""Mixture of the sources: how often each conversation is trained and which are held out, by number alone."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.recipe import Source


def apply_weight(key: str, source: Source, conversations: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return the conversations of one source as often as its weight says.

    A fraction is sampled, by the seed and this source alone.
    Raises UserError, naming `key`, if the weight leaves no conversation.
    """
    repeats = int(source.weight)
    sampled = round((source.weight - repeats) * len(conversations))
    if len(conversations) and not repeats and not sampled:
        raise UserError(
            f"{key}.weight: {source.weight} of {len(conversations):,} rows leaves no row. Write a larger weight."
        )
    rng = random.Random(f"weight {seed} {source.path} {source.name} {source.split}")
    chosen = sorted(rng.sample(range(len(conversations)), sampled))
    return np.concatenate([conversations] * repeats + [conversations[chosen]])


def hold_out(questions: Sequence[NDArray[np.bytes_]], share: float, seed: int) -> list[NDArray[np.bool_]]:
    """Return for each source a mask of its conversations that are held out, about `share` of all.

    Conversations with the same first user message are held out together: Multifaceted Collection has each instruction
    under three system messages, and one of them in training would make the validation loss a lie. Groups are taken in
    the order of a hash, so another source changes little in what is held out.

    `questions`: for each source, the digests of the first user messages of its conversations.
    Raises UserError if all conversations have the same first user message.
    """
    keys = [[_hash_with_seed(question, seed) for question in digests.tolist()] for digests in questions]
    groups = Counter(key for source_keys in keys for key in source_keys)
    if len(groups) < 2:
        raise UserError(
            "data.validation: every row begins with the same user message, so no share of them can be held out without "
            "the same question in both parts. Name validation sources of their own."
        )
    rows = sum(groups.values())
    target = min(max(round(share * rows), 1), rows - 1)
    chosen: set[bytes] = set()
    count = 0
    for key, size in sorted(groups.items()):
        if count + size <= target:
            chosen.add(key)
            count += size
    if not chosen:  # every group is larger than the share
        chosen.add(min(groups, key=lambda key: (groups[key], key)))
    return [np.fromiter((key in chosen for key in source_keys), bool, len(source_keys)) for source_keys in keys]


def _hash_with_seed(question: bytes, seed: int) -> bytes:
    return hashlib.blake2b(str(seed).encode() + question, digest_size=16).digest()
