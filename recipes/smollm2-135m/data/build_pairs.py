"""Write pairs.jsonl, the pairs of the quickstart's preference training: answers of its own model, judged by a program.

    python recipes/smollm2-135m/data/build_pairs.py [--model outputs/smollm2-135m-quickstart] [--output FILE]

The model answers conversations as in train.jsonl, but with other rules for each question, several times at temperature
1. An answer that breaks its rule is rejected; in some pairs one that keeps it and lacks the known answer. Chosen is one
of the model's own answers to the same conversation that does both, or the reference answer if none does. Answers are
kept in a file beside the output, so the same command continues.
"""

import argparse
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from build import HERE, Example, Row, build_train, write_rows

from train.evaluation.models.options import LocalModel
from train.evaluation.models.responses import generate_answers
from train.llm.request import Answer, Decoding
from train.pressure.verdicts import answers_question


class Draw(NamedTuple):
    """Conversations that the model answers: those of `kinds` among `rows` rows of build.py with `seed`."""

    seed: int
    rows: int
    samples: int
    kinds: tuple[str, ...]


DRAWS = (
    Draw(1, 1250, 4, ("single", "aligned", "permitted", "conflict", "injected", "turns", "turns_push_back")),
    Draw(2, 3000, 3, ("conflict", "injected")),  # more of those that it loses most often
)
MOST = {"rule": 705, "answer": 70}
"""Lack of the rejected answer, of its rule or of the known answer -> most pairs."""
MAX_NEW_TOKENS = 40


def main() -> None:
    """Write the pairs, and print the number of each kind and reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/smollm2-135m-quickstart", help="model that answers")
    parser.add_argument("--output", type=Path, default=HERE / "pairs.jsonl", help="output file")
    options = parser.parse_args()
    generator = random.Random(0)
    pairs = [pair for draw in DRAWS for pair in judge(draw, options.model, options.output, generator)]
    generator.shuffle(pairs)
    kept = []
    for reason, most in MOST.items():
        kept += [pair for pair in pairs if pair["reason"] == reason][:most]
    generator.shuffle(kept)
    write_rows(options.output, kept)
    print(f"{options.output}: {len(kept)} pairs: {dict(Counter((pair['kind'], pair['reason']) for pair in kept))}")


def judge(draw: Draw, model: str, output: Path, generator: random.Random) -> Iterator[Row]:
    """Yield a pair of each conversation in which the model wrote an answer to reject."""
    examples = [
        example
        for example in build_train(draw.rows, random.Random(draw.seed))
        if example.row["kind"] in draw.kinds and example.row["tactic"] != "shared"  # which asks for a code
    ]
    answers = generate_answers(
        LocalModel(model, batch_size=96, dtype="bfloat16"),
        [example.row["messages"][:-1] for example in examples],
        Decoding(MAX_NEW_TOKENS, temperature=1.0),
        output.with_suffix(".sqlite"),
        samples=draw.samples,
    )
    for example, samples in zip(examples, answers, strict=True):
        texts = [sample.text.strip() for sample in samples if isinstance(sample, Answer)]
        pair = make_pair(example, texts, generator)
        if pair:
            yield pair


def make_pair(example: Example, texts: Sequence[str], generator: random.Random) -> Row | None:
    """Return a pair of answers to the conversation of `example`; None if none of `texts` is rejected.

    None too for one that permits another form: pairs of these teach the model to yield where nothing is permitted.
    """
    row, form, question = example
    permitted = row["kind"] == "permitted"
    other_form = permitted and row["tactic"] == "choice"
    keeping = [text for text in texts if form.rule.check(question.question, text) != other_form]
    breaking = [text for text in texts if text not in keeping]
    right = [text for text in keeping if answers_question(text, question.accept)]
    lacking = [text for text in keeping if text not in right]
    if not (lacking or breaking) or (permitted and breaking):
        return None
    *prompt, reference = row["messages"]
    chosen = {**reference, "content": generator.choice(right)} if right else reference
    rejected = generator.choice(breaking or lacking)
    if chosen["content"] == rejected:
        return None
    return {
        "prompt": prompt,
        "chosen": [chosen],
        "rejected": [{**reference, "content": rejected}],
        **{key: row[key] for key in ("rule", "kind", "tactic")},
        "reason": "rule" if breaking else "answer",
    }


if __name__ == "__main__":
    main()
