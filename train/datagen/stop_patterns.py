"""Stop patterns: client-side stop sequences for replies that continue with an invented turn of the prompt.

After its reply, a model that was shown examples (`### User ... ### Assistant ...`) may continue with another example
of its own. That text is about a conversation that does not exist, so the reply is cut where it begins.
"""

import re
from dataclasses import dataclass

INVENTED_TURN = "made up a further turn of the prompt, and was cut there"
"""Label of the event in reports."""


@dataclass(frozen=True, slots=True)
class StopPattern:
    """Lines that begin an invented turn, wherever `after` matches the text before them.

    A heading at the start of a reply is part of the reply.
    """

    begins: re.Pattern[str]
    after: re.Pattern[str]

    @classmethod
    def of_prompt(cls, *headings: str, after: str) -> "StopPattern":
        """Return the pattern of a prompt with these headings (regular expressions, without their `###`)."""
        names = "|".join(
            ("user", "assistant", "human", "(?:the |its )?(?:existing )?system (?:message|prompt)", "system", *headings)
        )
        begins = (
            rf"^[ \t]*(?:#{{1,6}}[ \t]*\**(?:{names})\b[^\w\n]*$|\**(?:user|assistant|human)(?:\**:|:\**)"
            r"|\W{0,4}(?:the )?(?:next )?conversation[:*]+\s*$)"
        )
        return cls(re.compile(begins, re.IGNORECASE | re.MULTILINE), re.compile(after, re.IGNORECASE | re.DOTALL))


def cut_at_stop_pattern(reply: str, pattern: StopPattern) -> str:
    """Return the reply up to its first invented turn; the complete reply if it has none."""
    for match in pattern.begins.finditer(reply):
        before = reply[: match.start()]
        if pattern.after.search(before):
            return before.rstrip()
    return reply
