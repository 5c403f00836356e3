"""Slices of a packed batch: together they hold each token and each label once."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from train.loop.batch_info import BATCH_INFO, CountingCollator
from train.loop.sequence_slice import slice_batch


def examples(*documents: int) -> list[dict]:
    """Return one packed sequence of documents with these lengths; every third token is not trained."""
    tokens = list(range(10, 10 + sum(documents)))
    labels = [-100 if number % 3 == 0 else token for number, token in enumerate(tokens)]
    return [{"input_ids": tokens, "labels": labels, "seq_lengths": list(documents), "sequence": 4}]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("documents", [(8,), (1, 1, 1), (5, 7, 1), (3, 9, 4, 1, 6)])
def test_slices_hold_the_tokens_and_the_label_that_each_predicts(documents: tuple[int, ...], ranks: int) -> None:
    (example,) = examples(*documents)
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([example])
    slices = [slice_batch(batch, rank, ranks) for rank in range(ranks)]
    assert len({part["input_ids"].shape for part in slices}) == 1
    whole = {
        name: torch.cat([part[name] for part in slices], dim=1)[0].tolist()
        for name in ("input_ids", "labels", "position_ids", "shift_labels")
    }
    tokens, padding = sum(documents), len(whole["input_ids"]) - sum(documents)
    assert 0 <= padding < ranks
    assert whole["input_ids"][:tokens] == example["input_ids"]
    assert whole["position_ids"][:tokens] == [position for length in documents for position in range(length)]
    assert whole["labels"][tokens:] == whole["shift_labels"][tokens:] == [-100] * padding

    expected = []  # of each token, the label of the next one of its document
    for end in torch.tensor(documents).cumsum(0).tolist():
        start = len(expected)
        expected += [*example["labels"][start + 1 : end], -100]
    assert whole["shift_labels"][:tokens] == expected
    for part in slices:
        lengths = [*documents, padding] if padding else [*documents]
        assert part["cu_seq_lens_q"].tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert part["cu_seq_lens_q"].dtype == torch.int32
        assert part["max_length_q"] == max(lengths)


def test_the_first_rank_counts_a_shared_batch() -> None:
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    alone = CountingCollator(collate)(examples(5, 8))[BATCH_INFO]
    for rank, first_token in ((0, 0), (1, 7)):
        shared = CountingCollator(collate, Group(rank))(examples(5, 8))[BATCH_INFO]
        assert shared.sequences == alone.sequences
        assert shared.documents.tolist() == [5, 8]
        assert shared.trained_tokens == alone.trained_tokens
        assert shared.first_token == first_token
        assert shared.is_counted_here == (rank == 0)


class Group:
    """Two ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = lambda: rank

    def size(self) -> int:
        return 2
