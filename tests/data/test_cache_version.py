"""The cache's version changes whenever a fixed sample gives other tokens, labels, packing plans or system-gain rows."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from chat_templates import TRL_TEMPLATES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from train.data.cache import VERSION
from train.data.chat.system_role import SystemRole, apply_system_role
from train.data.chat.template import use_template
from train.data.packing import plan_packing
from train.data.prepare import examine
from train.recipe import load_recipe
from train.system_gain.validation_rows import load_gain_rows

SAMPLE = Path(__file__).with_name("version_sample")
"""A file of a few rows for each format: system messages, several turns, tools, reasoning, rows that are refused."""

DIGESTS_OF_VERSION = 1
DIGESTS = {
    "chatml, native": "22204ddca245e7af",
    "chatml-tools, native": "b33c082154e8d64c",
    "qwen3_training, turn": "18c8ca4a33794a43",
    "qwen3, merge_into_user": "b6ff1597e68c9aee",
    "rows of up to 300 tokens": "05295b1649ce67f3",
    "rows of up to 1,900 tokens": "a461461516311fd7",
}
"""Digests of the sample's tokens, labels, system-gain rows and packing plans, as they are under that version."""

ADVICE = """
The sample gives other {what} ({name}) than stored here for VERSION {stored}, and VERSION in train/data/cache.py is {now}.
- If you changed them on purpose: VERSION must be {next}, so that no run reads what older code cached. Then write
  DIGESTS_OF_VERSION = {next} and the new digests into this file; here it is {digest!r}.
- If only a library changed them (TRL's templates, transformers, jinja2): write the digest. Keys hold templates and
  library versions.
- If you expected no change: it is a bug.
"""


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a fixed vocabulary: bytes, a few merges (some across line breaks), control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "a"), ("Ġ", "t"), ("a", "n"), ("i", "n"), ("e", "r"), (".", "Ċ"), ("Ġt", "h")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def check(name: str, what: str, content: Iterator[bytes]) -> None:
    """Compare a digest with the one stored for VERSION."""
    hasher = hashlib.sha256()
    for part in content:
        hasher.update(part)
    digest = hasher.hexdigest()[:16]
    stored = DIGESTS_OF_VERSION
    assert digest == DIGESTS[name], ADVICE.format(
        what=what, name=name, stored=stored, now=VERSION, next=stored + 1, digest=digest
    )
    assert stored == VERSION, f"VERSION is {VERSION}: write DIGESTS_OF_VERSION = {VERSION}, and any digest that changed"


@pytest.mark.parametrize(
    ("template", "system_role"),
    [("chatml", "native"), ("chatml-tools", "native"), ("qwen3_training", "turn"), ("qwen3", "merge_into_user")],
)
def test_other_tokens_labels_or_gain_rows_need_another_version(
    template: str,
    system_role: SystemRole,
    byte_tokenizer: PreTrainedTokenizerFast,
    recipe_file: Callable[..., Path],
    tmp_path: Path,
) -> None:
    files = sorted(SAMPLE.glob("*.jsonl"))
    assert len(files) == 7
    data = {
        "sources": [{"path": str(path)} for path in files],
        "validation": [{"path": str(SAMPLE / "messages.jsonl")}, {"path": str(SAMPLE / "sharegpt.jsonl")}],
        "max_length": 2_048,
        "on_bad_row": "skip",
        "cache_dir": str(tmp_path / "cache"),
    }
    recipe = load_recipe(recipe_file(data=data, chat={"control_tokens_in_text": "escape"}, seed=3))
    name = template if (SAMPLE.parents[2] / f"train/data/templates/{template}.jinja").is_file() else ""
    use_template(byte_tokenizer, name or str(TRL_TEMPLATES / f"{template}.jinja"))
    apply_system_role(byte_tokenizer, system_role)
    prepared = examine(recipe, byte_tokenizer)

    def content() -> Iterator[bytes]:
        for split in (prepared.train, prepared.validation):
            assert split is not None
            for item in split.dataset:
                yield item["input_ids"].astype("<i8").tobytes() + item["labels"].astype("<i8").tobytes()
                yield json.dumps(item["seq_lengths"]).encode()
        yield str(sum(rows.count for rows in prepared.errors.values())).encode()
        gain = load_gain_rows(recipe, prepared, byte_tokenizer)
        assert gain is not None
        assert gain.rows
        for row in gain.rows:
            for encoded in [*row.own, *row.none, *(piece for other in row.others for piece in other)]:
                yield json.dumps([encoded.input_ids, encoded.labels]).encode()

    check(f"{template}, {system_role}", "tokens, labels or system-gain rows", content())


@pytest.mark.parametrize("longest", [300, 1_900])
def test_other_packing_plans_need_another_version(longest: int) -> None:
    """Short rows are exchanged between full sequences; of long ones the shortest are held back as fillers."""
    lengths = np.random.Generator(np.random.PCG64(5)).integers(1, longest, 2_000).tolist()

    def content() -> Iterator[bytes]:
        for epoch in (0, 1):
            plan = plan_packing(lengths, 2_048, multiple_of=8, seed=11, epoch=epoch)
            yield plan.rows.astype("<i4").tobytes() + plan.ends.astype("<i8").tobytes()

    check(f"rows of up to {longest:,} tokens", "packing plans", content())
