"""Samples in every evaluation: answers are generated, judged, recorded and printed; shares become metrics."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train.formatting import format_count, visible
from train.ranks import is_first_rank
from train.recipe import EvaluationSection
from train.recipe.measurements import SAMPLE_METRICS
from train.reporting.markdown import truncate_middle
from train.storage.step_lines import replace_lines

if TYPE_CHECKING:  # importing them takes seconds, and `--check` needs no more of this module than FILE
    from accelerate import Accelerator
    from transformers import PreTrainedTokenizerBase

    from train.samples.generation import GeneratedAnswer
    from train.samples.rows import SampledRow

FILE = "samples.jsonl"
"""In output_dir: a line per answer."""
Sample = Mapping[str, Any]
"""A line of FILE: step, kind, row, turn (from 1), messages, answer and verdict (null = not judged).

The answer is null where the prompt filled the model's context.
"""


class ValidationSamples:
    """Generation of a run's samples.

    name, answers: name of the measurement, and the number of answers that it generates.
    """

    name = "samples"

    def __init__(
        self,
        section: EvaluationSection,
        rows: "Sequence[SampledRow]",
        tokenizer: "PreTrainedTokenizerBase",
        output_dir: str,
        *,
        show: Callable[[str], None] = print,
        log: Callable[[int, list[Sample]], None] = lambda step, samples: None,
    ) -> None:
        """Set up the generation.

        Args:
            section: the settings of the recipe.
            rows: rows to sample.
            tokenizer: with the template and the tokens of the run.
            output_dir: folder of the run.
            show: prints a line, on the first rank.
            log: passes the samples of a step to trackers, on the first rank.
        """
        self._section, self._rows, self._tokenizer = section, rows, tokenizer
        self._path = Path(output_dir) / FILE
        self._show, self._log = show, log
        self.answers = sum(row.turns for row in rows)

    def measure(
        self, model: Any, accelerator: "Accelerator", step: int, prefix: str, on_progress: Callable[[int], None]
    ) -> Mapping[str, float]:
        """Return the shares by name: the same on all processes, which must all call it."""
        began = time.monotonic()
        answers = self._generate(model, accelerator, on_progress)
        seconds = time.monotonic() - began
        samples = list(self._judge(step, answers))
        shares = count_shares(samples)
        if is_first_rank():
            replace_lines(self._path, step, [dict(sample) for sample in samples])
            tokens = sum(answer.tokens for of_row in answers for answer in of_row if answer)
            self._print(step, samples, shares, tokens, seconds)
            self._log(step, samples)
        return {f"{prefix}_{SAMPLE_METRICS[kind]}": held / of for kind, (held, of) in shares.items()}

    def _generate(
        self, model: Any, accelerator: "Accelerator", on_progress: Callable[[int], None]
    ) -> "list[list[GeneratedAnswer | None]]":
        """Return the answers of each row, turn by turn: those of all rows to a turn are generated together.

        A turn without an answer ends its conversation: the later turns have none.
        """
        from train.samples.generation import generate_answers  # imports torch

        answers: list[list[GeneratedAnswer | None]] = [[] for _ in self._rows]
        for turn in range(max((row.turns for row in self._rows), default=0)):
            asked = [number for number, row in enumerate(self._rows) if turn < row.turns]
            texts = {number: [answer.text for answer in answers[number] if answer] for number in asked}
            asked = [number for number in asked if len(texts[number]) == turn]
            if not asked:
                break
            generated = generate_answers(
                model,
                self._tokenizer,
                accelerator,
                [self._rows[number].messages(texts[number]) for number in asked],
                max_new_tokens=self._section.max_new_tokens,
                batch_size=self._section.batch_size,
                on_progress=on_progress,
            )
            for number, answer in zip(asked, generated, strict=True):
                answers[number].append(answer)
        return answers

    def _judge(self, step: int, answers: "list[list[GeneratedAnswer | None]]") -> Iterator[Sample]:
        """Yield the samples of all rows. A turn without an answer does not follow the system message."""
        for row, of_row in zip(self._rows, answers, strict=True):
            texts = [answer.text for answer in of_row if answer]
            for turn in range(row.turns):
                text = texts[turn] if turn < len(texts) else None
                verdict = None if row.judge is None else text is not None and row.judge(turn, text)
                yield {
                    "step": step,
                    "kind": row.kind,
                    "row": row.key,
                    "turn": turn + 1,
                    "messages": row.messages(texts[:turn]) if turn <= len(texts) else None,
                    "answer": text,
                    "verdict": verdict,
                }

    def _print(
        self, step: int, samples: Sequence[Sample], shares: Mapping[str, tuple[int, int]], tokens: int, seconds: float
    ) -> None:
        followed = [
            f"{SAMPLE_METRICS[kind].replace('_', ' ')} {held:,} of {of:,} ({held / of:.1%})"
            for kind, (held, of) in shares.items()
        ]
        cost = (
            f"{format_count(len(samples), 'answer')}, {format_count(tokens, 'token')} in {seconds:.1f}s "
            f"({tokens / max(seconds, 1e-9):,.0f} tokens/s)"
        )
        self._show(f"samples at step {step}: {', '.join([*followed, cost])}")
        too_long = sum(sample["answer"] is None for sample in samples)
        if too_long:
            self._show(
                f"warning: {format_count(too_long, 'sample')} got no answer: the prompt fills the model's context"
            )
        for kind in dict.fromkeys(row.kind for row in self._rows):
            of_kind = [sample for sample in samples if sample["kind"] == kind]
            for sample in of_kind[: self._section.shown]:
                self._show(f"  {kind}{describe_verdict(sample)} {_one_line(sample)}")


def count_shares(samples: Sequence[Sample]) -> dict[str, tuple[int, int]]:
    """Return kind -> answers that follow the system message, and all answers; kinds that are judged."""
    shares: dict[str, tuple[int, int]] = {}
    for sample in samples:
        if sample["verdict"] is not None:
            held, of = shares.get(sample["kind"], (0, 0))
            shares[sample["kind"]] = held + sample["verdict"], of + 1
    return shares


def describe_verdict(sample: Sample) -> str:
    """Return ` (followed)`, ` (not followed)`, or nothing for a sample that is not judged."""
    return {True: " (followed)", False: " (not followed)", None: ""}[sample["verdict"]]


def _one_line(sample: Sample) -> str:
    """Return system message, last turn and answer on one line."""
    messages = sample["messages"] or []
    system = next((message["content"] for message in messages if message["role"] == "system"), "")
    texts = [system, messages[-1]["content"] if messages else "", sample["answer"] or ""]
    return " | ".join(truncate_middle(visible(text), 60) for text in texts)
