"""Contenders of `benchmark.py data`: one preparation of data per process.

    python -m benchmarks.data_contenders '{"contender": "ours", "rows_file": "rows.jsonl", ...}'

The clock runs from the rows on disk to rows ready to train, without imports, loading the tokenizer and counting the
result. Writes result.json (seconds, memory, counts) and tokens.npz (the arrays of `Tokens`) into the task's folder.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from train.cli import print_error
from train.errors import UserError

CONTENDERS = {
    "trl": "TRL's SFTTrainer (defaults)",
    "trl-N": "TRL's SFTTrainer ({processes} processes)",
    "ours": "janus-sft",
    "ours-again": "janus-sft (second start)",
    "tokenizer": "Hugging Face tokenizer alone",
    "fastokens": "fastokens alone",
}
"""Contenders in the order of the table; `ours-again` reads the cache of the `ours` before it."""


Task = dict[str, Any]
"""Tokenizer, template, max_length and processes as in the options; contender; rows_file, texts_file and folder."""


class Memory(NamedTuple):
    """Bytes of a process and its children; each shared page counts once.

    `anonymous` excludes pages of files, such as a memory-mapped cache, which the kernel can drop.
    """

    total: int
    anonymous: int


_NOTHING = Memory(0, 0)


def read_memory(process: psutil.Process) -> Memory:
    """Return the current memory of `process` and its descendants, by the kernel's proportional set sizes (Linux)."""
    total = anonymous = 0
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(OSError):  # it has ended
                lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
                kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
                total += kilobytes["Pss"] * 1024
                anonymous += (kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]) * 1024
    return Memory(total, anonymous)


@dataclass
class Clock:
    """Wall-clock and CPU seconds inside `running()`, which may be entered several times.

    `started`, `ended` (time.monotonic) and memory `before`, `after`: at the first entry and the last exit.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    before: Memory = _NOTHING
    after: Memory = _NOTHING

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        if not self.started:
            self.before = read_memory(psutil.Process())
        entered, used = time.monotonic(), _cpu_seconds()
        yield
        self.ended = time.monotonic()
        self.started = self.started or entered
        self.seconds += self.ended - entered
        self.cpu_seconds += _cpu_seconds() - used
        self.after = read_memory(psutil.Process())


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@dataclass
class Tokens:
    """Counts of prepared rows.

    - `documents`: a digest of the ids and labels of each row;
    - `occurrences`, `trained`: number of occurrences of each token id, and of those that are trained, [vocabulary].

    A bare tokenizer returns ids alone: nothing is trained.
    """

    documents: list[int] = field(default_factory=list)
    untrained_rows: int = 0
    sequences: int = 0
    occurrences: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    trained: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, ids: NDArray[np.integer], labels: NDArray[np.integer], lengths: Iterable[int]) -> None:
        """Count one sequence; `lengths`: tokens of each of its rows. Raises ValueError if they don't add up."""
        self.sequences += 1
        self.occurrences = _sum(self.occurrences, np.bincount(ids))
        self.trained = _sum(self.trained, np.bincount(labels[labels >= 0]))
        ends = np.cumsum([0, *lengths])
        if ends[-1] != len(ids) or len(ids) != len(labels):
            raise ValueError(f"a sequence of {len(ids)} ids, {len(labels)} labels and {ends[-1]} tokens in its rows")
        for start, end in pairwise(ends):
            both = np.concatenate([ids[start:end], labels[start:end]]).astype("<i4")
            self.documents.append(int.from_bytes(blake2b(both.tobytes(), digest_size=8).digest(), "little"))
            self.untrained_rows += bool((labels[start:end] < 0).all())

    def save(self, path: Path) -> None:
        """Write the arrays that are compared."""
        np.savez(
            path, documents=np.array(self.documents, np.uint64), occurrences=self.occurrences, trained=self.trained
        )


def _sum(total: NDArray[np.int64], more: NDArray[np.int64]) -> NDArray[np.int64]:
    if len(more) > len(total):
        total = np.pad(total, (0, len(more) - len(total)))
    total[: len(more)] += more
    return total


def _tokenizer(task: Task) -> Any:
    from transformers import AutoTokenizer

    from train.data.chat.template import use_template

    tokenizer = AutoTokenizer.from_pretrained(task["tokenizer"])
    use_template(tokenizer, task["template"])
    return tokenizer


def trl(task: Task, clock: Clock) -> Tokens:
    """Prepare with SFTTrainer and a tiny model; `trl-N` uses several processes."""
    from datasets import load_dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class TimedTrainer(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **options: Any) -> Any:
            with clock.running():
                return super()._prepare_dataset(*arguments, **options)

    tokenizer = _tokenizer(task)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = LlamaForCausalLM(config)
    arguments = SFTConfig(
        output_dir=str(Path(task["folder"], "trainer")),
        packing=True,
        max_length=task["max_length"],
        assistant_only_loss=True,
        dataset_num_proc=task["processes"] if task["contender"] == "trl-N" else None,
        bf16=False,
        report_to="none",
    )
    with clock.running():
        rows = load_dataset("json", data_files=task["rows_file"], split="train")
    trainer = TimedTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return count(trainer.train_dataset)


def ours(task: Task, clock: Clock) -> Tokens:
    """Prepare with `train.data.prepare`. `ours-again` reads the cache of the run before it in the same folder."""
    from train.data.prepare import prepare
    from train.model.tokenizer import load_chat_tokenizer
    from train.recipe import Recipe

    recipe = Recipe.model_validate(
        {
            "model": {"name_or_path": task["tokenizer"]},
            "chat": {"template": task["template"]},
            "data": {
                "sources": [{"path": task["rows_file"]}],
                "max_length": task["max_length"],
                "overlong": "truncate",
                "cache_dir": str(Path(task["folder"], "cache", "ours")),
            },
            "training": {"per_device_train_batch_size": 1},
            "output_dir": str(Path(task["folder"], "run")),
        }
    )
    tokenizer = load_chat_tokenizer(recipe.model, recipe.chat).tokenizer
    with clock.running():
        prepared = prepare(recipe, tokenizer)
    tokens, stats = count(prepared.train.dataset), prepared.train.stats
    reported = (stats.rows, stats.tokens, stats.trained_tokens, stats.sequences)
    counted = (len(tokens.documents), int(tokens.occurrences.sum()), int(tokens.trained.sum()), tokens.sequences)
    if reported != counted:
        raise ValueError(f"rows, tokens, trained tokens, sequences: reported {reported}, counted {counted}")
    return tokens


def tokenizer_alone(task: Task, clock: Clock) -> Tokens:
    """Tokenize the rendered texts with Hugging Face's tokenizer in one call, on all cores. Reading ids isn't timed."""
    backend = _tokenizer(task).backend_tokenizer
    texts = _texts(task)
    with clock.running():
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return _bare(np.asarray(encoding.ids, np.int32) for encoding in encodings)


def fastokens_alone(task: Task, clock: Clock) -> Tokens:
    """Tokenize the rendered texts with the package fastokens in one call, on all cores."""
    try:
        from fastokens import Tokenizer
    except ImportError as error:
        raise UserError("fastokens is not installed: `pip install fastokens`, or leave it out with --only.") from error
    backend = Tokenizer.from_json_str(_tokenizer(task).backend_tokenizer.to_str())
    texts = _texts(task)
    with clock.running():
        flat, offsets = backend.encode_batch_flat(texts)
        ids, ends = np.frombuffer(flat, np.uint32), np.frombuffer(offsets, np.uint64)
    return _bare(np.split(ids.astype(np.int32), ends[1:-1].astype(np.int64)))


RUNS: Mapping[str, Callable[[Task, Clock], Tokens]] = {
    "trl": trl,
    "trl-N": trl,
    "ours": ours,
    "ours-again": ours,
    "tokenizer": tokenizer_alone,
    "fastokens": fastokens_alone,
}


def count(rows: Any) -> Tokens:
    """Count packed sequences: mappings with input_ids, labels and seq_lengths."""
    tokens = Tokens()
    for index in range(len(rows)):
        row = rows[index]
        tokens.add(np.asarray(row["input_ids"]), np.asarray(row["labels"]), [int(n) for n in row["seq_lengths"]])
    return tokens


def _texts(task: Task) -> list[str]:
    with open(task["texts_file"], encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _bare(rows: Iterable[NDArray[np.int32]]) -> Tokens:
    tokens = Tokens()
    for ids in rows:
        tokens.add(ids, np.full(len(ids), -100, np.int32), [len(ids)])
    return tokens


def main() -> int:
    """Run one task and return its exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    task: Task = json.loads(sys.argv[1])
    folder = Path(task["folder"])
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache" / "datasets")  # before datasets is imported
    clock = Clock()
    try:
        tokens = RUNS[task["contender"]](task, clock)
    except UserError as error:
        print_error(error)
        return 2
    tokens.save(folder / "tokens.npz")
    result = {
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "started": clock.started,
        "ended": clock.ended,
        "memory_before": clock.before,
        "memory_after": clock.after,
        "rows": len(tokens.documents),
        "tokens": int(tokens.occurrences.sum()),
        "trained_tokens": int(tokens.trained.sum()),
        "untrained_rows": tokens.untrained_rows,
        "sequences": tokens.sequences,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
