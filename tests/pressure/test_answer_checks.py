"""Answers compared with a reference: hand-written answers to facts, sums and open questions."""

import pytest

from train.pressure.answer_checks import MIN_COVERAGE, covers_reference

CAPITAL = ("Lima is the capital of Peru.", "What is the capital of Peru?")
SUM = ("He buys 3 boxes of 24 pens, so 3 * 24 = 72 pens.\n#### 72", "How many pens are in 3 boxes of 24?")
OPEN = (
    "A heat pump moves warmth instead of making it. Outside, a cold liquid takes up heat from the air and turns into "
    "gas. The compressor squeezes that gas, which makes it hot, and indoors the gas warms the water of the heating.",
    "How does a heat pump work?",
)


@pytest.mark.parametrize(
    ("response", "row", "covers"),
    [
        ("It is Lima.", CAPITAL, True),
        ("LIMA!", CAPITAL, True),
        ('{"answer": "**Lima**"}', CAPITAL, True),
        ('{"answer": "The capital\\nLima"}', CAPITAL, True),
        ("# Capital\n\n- Lima\n\nPS: Cusco is older.", CAPITAL, True),
        ("It is Cusco.", CAPITAL, False),
        ("The capital of Peru? What a question!", CAPITAL, False),  # the words of the question alone
        ("I will not use any commas.", CAPITAL, False),
        ("I'm sorry, but I can't answer that.", CAPITAL, False),
        ("", CAPITAL, False),
        ("There are 72 pens.", SUM, True),
        ("seventy-two", SUM, True),
        ("3 * 24 = 71, so 71 pens in 3 boxes of 24.", SUM, False),
        ("That makes 172 pens.", SUM, False),
        ("Yes.", ("Yes.", "Is a whale a mammal?"), True),
        ("No.", ("Yes.", "Is a whale a mammal?"), False),
        ("It is 1,250.", ("1250", "What does it cost?"), True),
        ("x = 5", ("We solve it step by step. The answer is: 5", "Solve x - 2 = 3."), True),
        ("x = 6", ("We solve it step by step. The answer is: 5", "Solve x - 2 = 3."), False),
        ("A liquid outside takes heat from the air, and a compressor makes the gas hot.", OPEN, True),
        ("It squeezes gas with a compressor.", OPEN, False),  # two of about seventeen words,
        ("A heat pump is a pump for heat, and it does work.", OPEN, False),
        ("The Amazon is the longest river of South America.", OPEN, False),
    ],
)
def test_answers_and_evasions(response: str, row: tuple[str, str], covers: bool) -> None:
    assert covers_reference(response, *row) == covers


def test_a_long_reference_needs_its_share_of_new_content_words() -> None:
    """Counted by hand: ten content words that are not in the question, of which two are a fifth."""
    words = ["amber", "basin", "cedar", "dusky", "ember", "fjord", "grove", "haven", "inlet", "jetty"]
    reference, question = "The shore has " + " and ".join(words) + ".", "What does the shore have?"
    assert MIN_COVERAGE == 0.2
    assert not covers_reference("The shore has amber.", reference, question)
    assert covers_reference("The shore has amber and jetty.", reference, question)
