"""Janus-like rows for scripts/benchmark.py, made from a seed and the text of the Python that runs it.

    python scripts/benchmarks/rows.py 20000 rows.jsonl

Each row is a conversation of a system message, a question and an answer, as long as those of Multifaceted Collection
(Lee et al. 2024, arXiv:2405.17977): about 1,080 tokens a row with SmolLM2's tokenizer, system messages of 680 to 1,370
characters, questions of 25 to 18,600. Words come as often as in the docstrings of the standard library, one in fifty is
new (tokenizers remember words, so a closed vocabulary would flatter them), and there are lists, code and other scripts.
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
    """What texts are made of: words with their cumulative counts, and lines of real code."""

    words: tuple[str, ...]
    cumulative_counts: tuple[int, ...]
    code: tuple[str, ...]


@cache
def vocabulary() -> Vocabulary:
    """Words of the docstrings and lines of the code in the top modules of the running Python's standard library."""
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


def lengths(chance: random.Random) -> dict[str, int]:
    """Characters of a row's system message, question and answer: log-normal, as in Multifaceted Collection."""

    def drawn(median: float, sigma: float, least: int, most: int) -> int:
        return round(min(max(median * chance.lognormvariate(0, sigma), least), most))

    return {
        "system": drawn(980, 0.18, 680, 1_370),
        "user": drawn(330, 1.1, 25, 18_600),
        "assistant": drawn(2_600, 0.5, 200, 16_000),
    }


class Writer:
    """Writes texts of a wanted length. The same seed writes the same texts under the same version of Python."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._vocabulary = vocabulary()
        self._other_scripts = OTHER_SCRIPTS.split()

    def sentence(self) -> str:
        """6 to 24 words with their punctuation; now and then a new word, a number or another script."""
        chance = self._chance
        count = chance.randint(6, 24)
        words = chance.choices(self._vocabulary.words, cum_weights=self._vocabulary.cumulative_counts, k=count)
        if chance.random() < NEW_WORDS_PER_SENTENCE:
            words[chance.randrange(count)] = self._new_word()
        if chance.random() < 0.15:
            words[chance.randrange(count)] = chance.choice(
                (f"{chance.randrange(10_000):,}", f"{chance.random() * 100:.2f}", f"{chance.randrange(1900, 2030)}")
            )
        if chance.random() < 0.05:
            words[chance.randrange(count)] = chance.choice(self._other_scripts)
        for _ in range(count // 9):
            words[chance.randrange(count - 1)] += ","
        words[0] = words[0][:1].upper() + words[0][1:]
        return " ".join(words) + chance.choice("........?!:")

    def text(self, characters: int) -> str:
        """About `characters` of prose, lists and code (never more than a line less, cut at the end where longer)."""
        chance = self._chance
        blocks: list[str] = []
        length = 0
        while length < characters:
            kind = chance.random()
            if kind < 0.80 or characters - length < 300:
                block = " ".join(self.sentence() for _ in range(chance.randint(2, 6)))
            elif kind < 0.93:
                mark = chance.choice(("- ", "* ", "1. ", "2) ", "- **Note**: "))
                block = "\n".join(mark + self.sentence() for _ in range(chance.randint(3, 6)))
            else:
                first = chance.randrange(len(self._vocabulary.code) - 20)
                lines = self._vocabulary.code[first : first + chance.randint(4, 20)]
                block = "```python\n" + "\n".join(lines) + "\n```"
            blocks.append(block)
            length += len(block) + 2
        return "\n\n".join(blocks)[:characters].rstrip()

    def conversation(self) -> list[dict[str, str]]:
        """System message, question and answer."""
        return [{"role": role, "content": self.text(length)} for role, length in lengths(self._chance).items()]

    def _new_word(self) -> str:
        """A word that nobody has seen, made of the ends of two that are known."""
        first, second = self._chance.choices(self._vocabulary.words, k=2)
        word = first[: self._chance.randint(2, 5)] + second[-self._chance.randint(2, 5) :]
        return word.capitalize() if self._chance.random() < 0.5 else word.lower()


def generate(rows: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """The messages of `rows` conversations; a longer run begins with the rows of a shorter one."""
    writer = Writer(seed)
    return (writer.conversation() for _ in range(rows))


def main() -> None:
    """Write a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=int, help="how many")
    parser.add_argument("file", type=Path, help="where they go, as jsonl")
    parser.add_argument("--seed", type=int, default=42, help="decides every character (default 42)")
    options = parser.parse_args()
    with options.file.open("w", encoding="utf-8") as lines:
        for messages in generate(options.rows, options.seed):
            lines.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
