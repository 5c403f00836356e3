"""How much of an instruction a system message tells: it is written to fit any instruction."""

import functools

from train.datagen.text_units import split_words

FEWEST = 3
"""So many words of the instruction at least must stand in a message before it counts as telling anything."""

_STOP_WORDS = """
about above across after again against almost along already also although always among another answer anything
around asked asking because been before being below between both came cannot come could describe different does
doing done down during each either else enough even ever every everything explain find first following from further
gets give given goes going have having help here hers herself himself how however into itself just keep kind know
known large last least less like little long look made make many maybe mean might more most much must myself need
never next none nothing often once only other others otherwise ought ourselves over own part people perhaps please
provide question quite rather really right said same says second seem several shall should since small some someone
something still such sure take tell than that their theirs them themselves then there these they thing things think
this those though three through time together towards under until upon used user using very want wants well were
what whatever when where whether which while whom whose will with within without words work would write your yours
yourself
"""
"""English words that say nothing of what an instruction is about."""


@functools.cache
def _stop_words() -> frozenset[str]:
    return frozenset(_STOP_WORDS.split())


def extract_content_words(text: str) -> set[str]:
    """Words of four letters or more that aren't among the most common of English. In scripts without blanks between
    words there are none."""
    stop_words = _stop_words()
    return {word for word in split_words(text) if len(word) > 3 and word not in stop_words}


def measure_instruction_leak(message: str, instruction: str) -> float:
    """Which share of the instruction's content words the message holds, 0 to 1; 0 where it holds fewer than three."""
    of_instruction = extract_content_words(instruction)
    told = of_instruction & extract_content_words(message)
    return len(told) / len(of_instruction) if len(told) >= FEWEST else 0.0
