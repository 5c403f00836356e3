"""Content words of a text: those that say what it is about."""

import functools

from train.datagen.text_units import split_words

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
"""English words that say nothing about the subject of a text."""


@functools.cache
def _stop_words() -> frozenset[str]:
    return frozenset(_STOP_WORDS.split())


def extract_content_words(text: str) -> set[str]:
    """Return the words of four letters or more, without English stop words.

    Scripts without blanks between words have none.
    """
    stop_words = _stop_words()
    return {word for word in split_words(text) if len(word) > 3 and word not in stop_words}
