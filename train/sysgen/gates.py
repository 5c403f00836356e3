"""What a system message is looked at for before its row is kept."""


def language_of(text: str) -> str | None:
    """ISO 639-1 code; None where the text is too short or too mixed to tell."""
    return None


def leaked_share(system: str, questions: str, answer: str) -> float:
    """How much of an answer its system message gives away."""
    return 0.0
