"""Empty answers: which answers are empty, and whether a run has gone on without one.

The client asks again for an empty answer, and writes the last one into the journal. A later start asks for it once
more, unless the run went on without it (another try, a row that was written): then another answer would change what
stands in the files.
"""

from dataclasses import replace

from train.llm.journal import Answer, Journal, Request
from train.llm.reasoning.answer import read_answer

_SHORT = 64
"""Characters."""
_LAST_OF_MARKS = (">", "]", "|", "▷", "`")


def is_empty_answer(answer: Answer) -> bool:
    """Return True where an answer is empty, or is empty once it is read: reasoning that has ended, control tokens.

    Only a text that is short or ends in a mark can be empty once it is read, so no other is read here.
    """
    text = answer.text
    if answer.empty or not (len(text) <= _SHORT or text[-_SHORT:].rstrip().endswith(_LAST_OF_MARKS)):
        return answer.empty
    read, said = read_answer(answer)
    return read.empty and not said.unfinished


def has_nonempty_answer(journal: Journal, model: str, request: Request) -> bool:
    """Return whether the journal holds an answer with text: to this request, or after empty ones to a next sample."""
    while answer := journal.find(request.key(model), request.decoding.max_tokens, accept_empty=True):
        if not is_empty_answer(answer):
            return True
        request = replace(request, sample=request.sample + 1)
    return False
