"""One preparation of data, measured: scripts/benchmark.py starts this file afresh for each run of each contender.

    python scripts/benchmarks/data_contenders.py '{"contender": "ours", "rows_file": "rows.jsonl", ...}'

Timed is what lies between the rows on disk and the rows ready to train; imports, loading the tokenizer and counting
what came out are not. Writes result.json (seconds, when they passed, memory, counts) and tokens.npz (what `Tokens`
says) into the task's folder.
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

from train.errors import UserError

CONTENDERS = {
    "trl": "TRL's SFTTrainer (defaults)",
    "trl-N": "TRL's SFTTrainer ({processes} processes)",
    "ours": "janus-sft",
    "ours-again": "janus-sft (second start)",
    "tokenizer": "Hugging Face tokenizer alone",
    "fastokens": "fastokens alone",
}
"""What can be measured, in the order of the table; an `ours-again` finds what the `ours` before it left."""


@dataclass(frozen=True)
class Task:
    """What to measure. `texts_file`: the rows as their template writes them, a JSON string a line."""

    contender: str
    tokenizer: str
    template: str
    rows_file: Path
    texts_file: Path
    folder: Path
    max_length: int
    processes: int

    def to_json(self) -> str:
        """The argument that this file is started with."""
        return json.dumps(vars(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """The reverse of `to_json`."""
        fields = json.loads(text)
        return cls(**{**fields, **{name: Path(fields[name]) for name in ("rows_file", "texts_file", "folder")}})


class Memory(NamedTuple):
    """Bytes that a process and its children hold, each shared page counted once.

    `anonymous` leaves out pages of files, which the kernel can drop: a memory-mapped cache is no growth.
    """

    total: int
    anonymous: int


NOTHING = Memory(0, 0)


def memory(process: psutil.Process) -> Memory:
    """What `process` and all below it hold now, from the kernel's proportional set sizes (Linux)."""
    total = anonymous = 0
    with suppress(psutil.NoSuchProcess):
        for each in [process, *process.children(recursive=True)]:
            with suppress(OSError):  # it has ended in between
                lines = Path(f"/proc/{each.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
                kilobytes = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
                total += kilobytes["Pss"] * 1024
                anonymous += (kilobytes["Pss_Anon"] + kilobytes["Pss_Shmem"]) * 1024
    return Memory(total, anonymous)


@dataclass
class Clock:
    """Seconds spent inside `running()`, on the wall and on all cores; the memory is read outside of them.

    The moments (time.monotonic) and the memory are those when it was first entered and last left.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    before: Memory = NOTHING
    after: Memory = NOTHING

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time inside."""
        if not self.started:
            self.before = memory(psutil.Process())
        entered, used = time.monotonic(), _cpu_seconds()
        yield
        self.ended = time.monotonic()
        self.started = self.started or entered
        self.seconds += self.ended - entered
        self.cpu_seconds += _cpu_seconds() - used
        self.after = memory(psutil.Process())


def _cpu_seconds() -> float:
    """Of this process and of those below it that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@dataclass
class Tokens:
    """What came out, counted from the rows themselves.

    `documents`: a digest of ids and labels of each row. `occurrences`, `trained`: how often each token id is there, and
    how often it is trained. A bare tokenizer gives ids alone: nothing is trained.
    """

    documents: list[int] = field(default_factory=list)
    untrained_rows: int = 0
    sequences: int = 0
    occurrences: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    trained: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def add(self, ids: NDArray[np.integer], labels: NDArray[np.integer], lengths: Iterable[int]) -> None:
        """Count one sequence that holds rows of so many tokens."""
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
        """Write what a comparison needs."""
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

    tokenizer = AutoTokenizer.from_pretrained(task.tokenizer)
    use_template(tokenizer, task.template)
    return tokenizer


def trl(task: Task, clock: Clock) -> Tokens:
    """TRL's own preparation as `SFTTrainer(...)` runs it, of a model too small to matter; with `trl-N` in processes."""
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
        output_dir=str(task.folder / "trainer"),
        packing=True,
        max_length=task.max_length,
        assistant_only_loss=True,
        dataset_num_proc=task.processes if task.contender == "trl-N" else None,
        bf16=False,
        report_to="none",
    )
    with clock.running():
        rows = load_dataset("json", data_files=str(task.rows_file), split="train")
    trainer = TimedTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
    return count(trainer.train_dataset)


def ours(task: Task, clock: Clock) -> Tokens:
    """`prepare`, as the door calls it. `ours-again` finds the cache that the run before it left in the same folder."""
    import yaml

    from train.data.prepare import prepare
    from train.model.tokenizer import load_chat_tokenizer
    from train.recipe import DataSection, load_recipe

    data: dict[str, object] = {
        "sources": [{"path": str(task.rows_file)}],
        "max_length": task.max_length,
        "overlong": "truncate",
    }
    if "cache_dir" in DataSection.model_fields:
        data["cache_dir"] = str(task.folder / "cache" / "ours")
    file = task.folder / "recipe.yaml"
    sections = {"model": {"name_or_path": task.tokenizer}, "chat": {"template": task.template}, "data": data}
    file.write_text(
        yaml.safe_dump(
            {**sections, "training": {"per_device_train_batch_size": 1}, "output_dir": str(task.folder / "run")}
        ),
        encoding="utf-8",
    )
    recipe = load_recipe(file)
    tokenizer = load_chat_tokenizer(recipe.model, recipe.chat).tokenizer
    with clock.running():
        prepared = prepare(recipe, tokenizer)
    tokens, account = count(prepared.train.dataset), prepared.train.stats
    claimed = (account.rows, account.tokens, account.trained_tokens, account.sequences)
    counted = (len(tokens.documents), int(tokens.occurrences.sum()), int(tokens.trained.sum()), tokens.sequences)
    if claimed != counted:
        raise ValueError(f"the account says rows, tokens, trained tokens, sequences {claimed}, the rows {counted}")
    return tokens


def tokenizer_alone(task: Task, clock: Clock) -> Tokens:
    """The Hugging Face tokenizer over the rendered texts in one call, on all cores; taking its ids out is not timed."""
    backend = _tokenizer(task).backend_tokenizer
    texts = _texts(task)
    with clock.running():
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    return _bare(np.asarray(encoding.ids, np.int32) for encoding in encodings)


def fastokens_alone(task: Task, clock: Clock) -> Tokens:
    """The package fastokens over the rendered texts in one call, on all cores."""
    try:
        from fastokens import Tokenizer
    except ImportError as fault:
        raise UserError("fastokens is not installed: `pip install fastokens`, or leave it out with --only.") from fault
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
    """Count packed rows: a sequence of mappings with input_ids, labels and seq_lengths."""
    tokens = Tokens()
    for index in range(len(rows)):
        row = rows[index]
        tokens.add(np.asarray(row["input_ids"]), np.asarray(row["labels"]), [int(n) for n in row["seq_lengths"]])
    return tokens


def _texts(task: Task) -> list[str]:
    with task.texts_file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _bare(rows: Iterable[NDArray[np.int32]]) -> Tokens:
    tokens = Tokens()
    for ids in rows:
        tokens.add(ids, np.full(len(ids), -100, np.int32), [len(ids)])
    return tokens


def main() -> int:
    """Run one task; the exit code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    task = Task.from_json(sys.argv[1])
    os.environ["HF_DATASETS_CACHE"] = str(task.folder / "cache" / "datasets")  # before datasets is imported
    clock = Clock()
    try:
        tokens = RUNS[task.contender](task, clock)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    tokens.save(task.folder / "tokens.npz")
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
    (task.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
