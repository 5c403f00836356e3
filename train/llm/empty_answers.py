"""Empty answers: the test for one, and the search for the answer with which a run continued after one.

The client asks again for an empty answer, and stores the last one in the journal. A later start asks for it once more,
unless the run continued without it (another try, a written row): then another answer would change what is in the files.
"""

from dataclasses import replace

from train.llm.journal import Journal
from train.llm.reasoning import read_answer
from train.llm.request import Answer, Request

_SHORT = 64
"""Characters."""
_LAST_OF_MARKS = (">", "]", "|", "▷", "`")


def is_empty_answer(answer: Answer) -> bool:
    """Return True for an answer without text, also after reasoning that has ended and control tokens are removed.

    Only a text that is short or ends in a mark can become empty, so no other is searched for reasoning.
    """
    text = answer.text
    if answer.empty or not (len(text) <= _SHORT or text[-_SHORT:].rstrip().endswith(_LAST_OF_MARKS)):
        return answer.empty
    answer, reply = read_answer(answer)
    return answer.empty and not reply.unfinished


def has_nonempty_answer(journal: Journal, model: str, request: Request) -> bool:
    """Return True if the journal has an answer with text: to this request, or after empty ones to a next sample."""
    while answer := journal.find(request.key(model), request.decoding.max_tokens, accept_empty=True):
        if not is_empty_answer(answer):
            return True
        request = replace(request, sample=request.sample + 1)
    return False
