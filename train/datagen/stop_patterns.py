"""Further turns of the prompt that a model makes up after its own.

A model that is shown examples, as in `### User ... ### Assistant ...`, may go on with another one once it has replied.
What it says there is about a conversation that does not exist, so the reply ends where the further turn begins.
"""

import re
from dataclasses import dataclass

INVENTED_TURN = "made up a further turn of the prompt, and was cut there"
"""The event, in the words of the reports."""


@dataclass(frozen=True, slots=True)
class StopPattern:
    """The lines that begin a further turn where `after` finds something in the text before them.

    A heading at the start of a reply is part of it.
    """

    begins: re.Pattern[str]
    after: re.Pattern[str]

    @classmethod
    def of_prompt(cls, *headings: str, after: str) -> "StopPattern":
        """Return that of a prompt with these headings (regular expressions, without their `###`)."""
        names = "|".join(
            ("user", "assistant", "human", "(?:the |its )?(?:existing )?system (?:message|prompt)", "system", *headings)
        )
        begins = (
            rf"^[ \t]*(?:#{{1,6}}[ \t]*\**(?:{names})\b[^\w\n]*$|\**(?:user|assistant|human)(?:\**:|:\**)"
            r"|\W{0,4}(?:the )?(?:next )?conversation[:*]+\s*$)"
        )
        return cls(re.compile(begins, re.IGNORECASE | re.MULTILINE), re.compile(after, re.IGNORECASE | re.DOTALL))


def cut_at_stop_pattern(reply: str, turn: StopPattern) -> str:
    """Return the reply up to the first further turn; whole where there is none."""
    for found in turn.begins.finditer(reply):
        before = reply[: found.start()]
        if turn.after.search(before):
            return before.rstrip()
    return reply
