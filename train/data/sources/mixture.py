"""Which conversations of the sources are trained, how often, and which are held out: by number, none is read."""

import hashlib
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from train.errors import UserError
from train.recipe import Source


def weighted(key: str, source: Source, conversations: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The conversations of one source as often as its weight says; what is sampled of it depends on no other source.

    Raises UserError, naming `key`, where the weight leaves none of them.
    """
    whole = int(source.weight)
    sampled = round((source.weight - whole) * len(conversations))
    if len(conversations) and not whole and not sampled:
        raise UserError(f"{key}.weight: {source.weight} of {len(conversations):,} rows is none. Write more.")
    chance = random.Random(f"weight {seed} {source.path} {source.name} {source.split}")
    chosen = sorted(chance.sample(range(len(conversations)), sampled))
    return np.concatenate([conversations] * whole + [conversations[chosen]])


def held_out(questions: Sequence[NDArray[np.bytes_]], share: float, seed: int) -> list[NDArray[np.bool_]]:
    """About `share` of the conversations, by whole groups of the same first user message: true where held out.

    `questions`: for each source the digests of its conversations' first user messages. Multifaceted Collection has each
    instruction under three system messages; one seen in training would make the validation loss a lie. Groups are taken
    in the order of a hash, so more sources change little in what is chosen.
    Raises UserError where all conversations are of one group.
    """
    keys = [[_shuffled(question, seed) for question in part.tolist()] for part in questions]
    groups = Counter(key for part in keys for key in part)
    if len(groups) < 2:
        raise UserError(
            "data.validation: every row begins with the same user message, so no share of them can be held out without "
            "the same question in both parts. Name validation sources of their own."
        )
    rows = sum(groups.values())
    wanted = min(max(round(share * rows), 1), rows - 1)
    chosen: set[bytes] = set()
    count = 0
    for key, size in sorted(groups.items()):
        if count + size <= wanted:
            chosen.add(key)
            count += size
    if not chosen:  # every group is larger than the share
        chosen.add(min(groups, key=lambda key: (groups[key], key)))
    return [np.fromiter((key in chosen for key in part), bool, len(part)) for part in keys]


def _shuffled(question: bytes, seed: int) -> bytes:
    return hashlib.blake2b(str(seed).encode() + question, digest_size=16).digest()
