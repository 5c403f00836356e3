"""Janus-like rows for scripts/benchmark.py, generated from a seed and the standard library's docstrings and code.

    python scripts/benchmarks/rows.py 20000 rows.jsonl

Each row has a system message, a question and an answer as long as those of Multifaceted Collection (Lee et al. 2024,
arXiv:2405.17977): about 1,080 tokens per row with SmolLM2's tokenizer, system messages of 680 to 1,370 characters,
questions of 25 to 18,600. Words have the frequencies of the docstrings; one in fifty is new, as tokenizers cache words
and a closed vocabulary would be too easy. There are lists, code and other scripts too.
"""

import argparse
import ast
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

NEW_WORDS_PER_SENTENCE = 0.3
OTHER_SCRIPTS = (
    "naïve café São-Paulo Zürich Ærøskøbing œuvre jalapeño coöperate Dvořák Łódź 東京 大切 機械学習 한국어 Ελλάδα "
    "Москва שלום مرحبا हिन्दी — → ≤ ≈ €40 30° ½ “quoted” ‘so’ … ✓ 🙂 🚀"
)
_LIKE_A_CONTROL_TOKEN = re.compile(
    r"<\S*>|\[[A-Z_/]+\]"
)  # SmolLM2 has <filename>, Mistral [INST]: such rows are refused
_WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")


@dataclass(frozen=True)
class Vocabulary:
    """Source of texts: words with their cumulative counts, and lines of real code."""

    words: tuple[str, ...]
    cumulative_counts: tuple[int, ...]
    code: tuple[str, ...]


@cache
def vocabulary() -> Vocabulary:
    """Collect words of docstrings and lines of code from the top modules of the running Python's standard library."""
    counts: Counter[str] = Counter()
    code: list[str] = []
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = [line for line in source.splitlines() if line.strip() and len(line) < 120]
        code += [line for line in lines if not _LIKE_A_CONTROL_TOKEN.search(line)]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                counts.update(_WORD.findall(ast.get_docstring(node) or ""))
    words = sorted(counts)
    return Vocabulary(tuple(words), tuple(accumulate(counts[word] for word in words)), tuple(code))


def lengths(rng: random.Random) -> dict[str, int]:
    """Draw the characters of a row's system message, question and answer: log-normal, as in Multifaceted Collection."""

    def draw(median: float, sigma: float, minimum: int, maximum: int) -> int:
        return round(min(max(median * rng.lognormvariate(0, sigma), minimum), maximum))

    return {
        "system": draw(980, 0.18, 680, 1_370),
        "user": draw(330, 1.1, 25, 18_600),
        "assistant": draw(2_600, 0.5, 200, 16_000),
    }


class Writer:
    """Writer of texts of given lengths. Equal seeds give equal texts under the same version of Python."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._vocabulary = vocabulary()
        self._other_scripts = OTHER_SCRIPTS.split()

    def sentence(self) -> str:
        """Write 6 to 24 words with punctuation; some sentences have a new word, a number or another script."""
        rng = self._rng
        count = rng.randint(6, 24)
        words = rng.choices(self._vocabulary.words, cum_weights=self._vocabulary.cumulative_counts, k=count)
        if rng.random() < NEW_WORDS_PER_SENTENCE:
            words[rng.randrange(count)] = self._new_word()
        if rng.random() < 0.15:
            words[rng.randrange(count)] = rng.choice(
                (f"{rng.randrange(10_000):,}", f"{rng.random() * 100:.2f}", f"{rng.randrange(1900, 2030)}")
            )
        if rng.random() < 0.05:
            words[rng.randrange(count)] = rng.choice(self._other_scripts)
        for _ in range(count // 9):
            words[rng.randrange(count - 1)] += ","
        words[0] = words[0][:1].upper() + words[0][1:]
        return " ".join(words) + rng.choice("........?!:")

    def text(self, characters: int) -> str:
        """Write prose, lists and code: at most `characters` characters, and at most a line less."""
        rng = self._rng
        blocks: list[str] = []
        length = 0
        while length < characters:
            kind = rng.random()
            if kind < 0.80 or characters - length < 300:
                block = " ".join(self.sentence() for _ in range(rng.randint(2, 6)))
            elif kind < 0.93:
                mark = rng.choice(("- ", "* ", "1. ", "2) ", "- **Note**: "))
                block = "\n".join(mark + self.sentence() for _ in range(rng.randint(3, 6)))
            else:
                first = rng.randrange(len(self._vocabulary.code) - 20)
                lines = self._vocabulary.code[first : first + rng.randint(4, 20)]
                block = "```python\n" + "\n".join(lines) + "\n```"
            blocks.append(block)
            length += len(block) + 2
        return "\n\n".join(blocks)[:characters].rstrip()

    def conversation(self) -> list[dict[str, str]]:
        """Write a system message, a question and an answer."""
        return [{"role": role, "content": self.text(length)} for role, length in lengths(self._rng).items()]

    def _new_word(self) -> str:
        """Join the start of one word and the end of another."""
        first, second = self._rng.choices(self._vocabulary.words, k=2)
        word = first[: self._rng.randint(2, 5)] + second[-self._rng.randint(2, 5) :]
        return word.capitalize() if self._rng.random() < 0.5 else word.lower()


def generate(rows: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Generate the messages of `rows` conversations; more rows begin with the same ones."""
    writer = Writer(seed)
    return (writer.conversation() for _ in range(rows))


def main() -> None:
    """Write a file of rows as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, help="number of rows")
    parser.add_argument("file", type=Path, help="JSON lines to write")
    parser.add_argument("--seed", type=int, default=42, help="decides every character (default 42)")
    options = parser.parse_args()
    with options.file.open("w", encoding="utf-8") as lines:
        for messages in generate(options.rows, options.seed):
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
