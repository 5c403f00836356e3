import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import AutoTokenizer

from train.data.chat.rendering import ShortcutError
from train.data.chat.template import use_template
from train.data.fast_tokenizer import FastTokenizer, UnsupportedTokenizerError
from train.data.loss_mask import Encoder
from train.data.sources.formats import RowError

LETTERS = "abc XYZ\n\n\t  .,!'019éÅ\u0301\u030añ日本語한글العربية😀👩‍🚀🇩🇪\u200b\u00a0\ufeff▁Ġ<|>[]/\\{}𝔘"
WORDS = ["the", "assistant", "system", " user", "<|im_end|> ", "[/INST]", "</s>", "<s>", "<unk>", "don't", "ﬁ", "naïve"]

texts = st.one_of(
    st.text(max_size=60),
    st.text(alphabet=LETTERS, max_size=80),
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
)
conversations = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6)


def messages_of(system: str, question: str, answer: str) -> list[dict]:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": answer},
        {"role": "assistant", "content": question},
    ]


def compare(exact: Encoder, fast: Encoder, rows: list[list[dict]]) -> None:
    """Check that both encoders give the same rows and the same errors."""
    pairs = [(row, None) for row in rows]
    assert not fast.why_not_fast
    for fast_rows, exact_rows in zip(fast.encode(pairs, "assistant"), exact.encode(pairs, "assistant"), strict=True):
        if isinstance(exact_rows, RowError):
            assert isinstance(fast_rows, RowError)
            assert (fast_rows.kind, fast_rows.detail) == (exact_rows.kind, exact_rows.detail)
        else:
            assert not isinstance(fast_rows, RowError)
            assert [(row.input_ids, row.labels) for row in fast_rows] == [
                (row.input_ids, row.labels) for row in exact_rows
            ]


@pytest.fixture(scope="module")
def encoders(smollm2, mistral_tokenizer_v1) -> dict[str, tuple[object, Encoder, Encoder]]:
    """Kind of tokenizer -> the tokenizer, its exact encoder, its fast encoder."""
    byte_level, sentencepiece = AutoTokenizer.from_pretrained(smollm2), mistral_tokenizer_v1()
    use_template(byte_level, "chatml")
    use_template(sentencepiece, "mistral-system")
    return {
        kind: (tokenizer, Encoder(tokenizer), Encoder(tokenizer, fast=True))
        for kind, tokenizer in (("byte-level", byte_level), ("sentencepiece", sentencepiece))
    }


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=conversations)
def test_tokens_and_labels_are_those_of_the_tokenizer(encoders, kind: str, rows) -> None:
    compare(*encoders[kind][1:], [messages_of(*row) for row in rows])


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_hardly_any_row_needs_the_tokenizer_itself(encoders, kind: str) -> None:
    tokenizer, exact, _ = encoders[kind]
    rng = random.Random(0)
    letters = LETTERS.replace("▁", "")  # SentencePiece's own sign for a blank
    fast = FastTokenizer(tokenizer, exact._backend)
    spelled = 0
    for _ in range(200):
        text = "".join(rng.choice(letters) for _ in range(40))
        rendered = tokenizer.apply_chat_template(messages_of("s", text, "a b"), tokenize=False)
        spelled += fast.encode([rendered], [[(0, len(rendered))]]) != [None]
    assert spelled > 190


def test_token_spans_are_those_of_the_tokenizers_offsets(chatml_tokenizer) -> None:
    text = "<|im_start|>user\nnaïve 日本 👩‍🚀 words<|im_end|>\n"
    backend = Encoder(chatml_tokenizer)._backend
    fast = FastTokenizer(chatml_tokenizer, backend)
    offsets = backend.encode(text, add_special_tokens=False).offsets
    starts = sorted({start for start, _ in offsets})
    for start in starts[1:]:
        (row,) = fast.encode([text], [[(0, start)]])
        if any(first < start < end for first, end in offsets):
            assert row is None
        else:
            assert row[1].tolist() == [[0, sum(first < start for first, _ in offsets)]]


def test_a_text_that_the_tokenizer_changes_is_left_to_it(chatml_tokenizer) -> None:
    """NFC joins letters and their accents, so positions shift: such rows are encoded by the tokenizer itself."""
    chatml_tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    exact, fast_one = Encoder(chatml_tokenizer), Encoder(chatml_tokenizer, fast=True)
    compare(
        exact,
        fast_one,
        [messages_of("cafe\u0301 " * 9, "A\u030angstro\u0308m", "cafe\u0301"), messages_of("a", "b", "c")],
    )
    fast = FastTokenizer(chatml_tokenizer, Encoder(chatml_tokenizer)._backend)
    for text, spelled in (("cafe\u0301", False), ("café", True)):
        assert (fast.encode([text], [[(0, len(text))]]) != [None]) is spelled


def test_a_difference_in_tokens_is_an_error(chatml_tokenizer) -> None:
    fast = FastTokenizer(chatml_tokenizer, Encoder(chatml_tokenizer)._backend)
    fast.check(["some text"])
    other_backend = Encoder(chatml_tokenizer)._backend
    other_backend.add_special_tokens(["some text"])
    fast._backend = other_backend
    with pytest.raises(ShortcutError, match="some text"):
        fast.check(["other text", "some text"])


def test_a_tokenizer_of_another_kind_is_not_replaced(chatml_tokenizer) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UnsupportedTokenizerError, match="bytes aren't known"):
        FastTokenizer(chatml_tokenizer, backend)


def test_touching_spans_are_merged() -> None:
    from train.data.chat.rendering import Rendering
    from train.data.loss_mask import _make_row, find_runs

    ids, spans = np.arange(6, dtype=np.int32), np.asarray([[0, 2], [2, 3], [5, 6]], np.int32)
    row = _make_row(ids, spans, Rendering("", []))
    assert row.trained.tolist() == [[0, 3], [5, 6]]
    assert row.labels == [0, 1, 2, -100, -100, 5]
    assert _make_row(ids, np.empty((0, 2), np.int32), Rendering("", [])).trained.tolist() == []
    assert find_runs(np.asarray([True, True, True, False, False, True])).tolist() == [[0, 3], [5, 6]]
    weights = np.asarray([0.5, 0.5, 2, 0, 0, 1], np.float32)
    assert find_runs(weights).tolist() == [[0, 2], [2, 3], [5, 6]]
    assert find_runs(weights[:0]).tolist() == []
    weighted = _make_row(ids, spans, Rendering("", [], [0.5, 2, 1]))  # spans of different weights stay apart
    assert (weighted.trained.tolist(), weighted.span_weights.tolist()) == (spans.tolist(), [0.5, 2, 1])
    merged = _make_row(ids, spans, Rendering("", [], [0.5, 0.5, 1]))
    assert (merged.trained.tolist(), merged.span_weights.tolist()) == ([[0, 3], [5, 6]], [0.5, 1])
