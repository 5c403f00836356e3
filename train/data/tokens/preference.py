"""Rows of preference training -> tokens: pairs of one row, or single answers that are paired with those of siblings."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pyarrow

from train.data.loss_mask import EncodedRow
from train.data.sources.formats import Conversation, RowError
from train.data.sources.loss_weights import weight_of
from train.data.sources.pairs import PREFERENCE, read_pair
from train.data.sources.readers import Chunk
from train.data.tokens.pairs import Tokens, join_answer, sibling_key
from train.data.tokens.table import RowIssues, digest_instruction, make_batch
from train.data.tokens.workers import RowTokenizer
from train.errors import UserError

_PROVEN = 2
"""Pairs of siblings in a chunk whose tokens are compared with those of the complete conversation."""


class PreferenceTokenizer(RowTokenizer):
    """Rows of preference training -> tokens.

    A row of the format preference is a conversation of two rows of the token table. Other rows (`train_on: last`)
    become one row each, whose answer can be joined to the prompt of a sibling. The `question` of a row is its
    instruction.
    """

    def encode_chunk(self, file: int, chunk: Chunk, format: str) -> tuple[pyarrow.RecordBatch, RowIssues]:
        """Return the rows of a chunk as a batch of the token table, and its issues.

        Raises UserError if the tokens of a sibling's answer depend on the prompt before it.
        """
        if format == PREFERENCE:
            return self._encode_pairs(file, chunk)
        encoded, issues = self.encode_rows(file, chunk, format)
        rows = [(conversation, row, _last_answer(conversation)) for conversation, (row,) in encoded]
        questions = [digest_instruction(conversation, answer) for conversation, _, answer in rows]
        self._prove(rows, questions)
        return make_batch(file, encoded, questions=questions), issues

    def _encode_pairs(self, file: int, chunk: Chunk) -> tuple[pyarrow.RecordBatch, RowIssues]:
        issues = RowIssues()
        pairs = [*self.read_rows(file, chunk, issues, read_pair)]
        results = self.encode([half for pair, _ in pairs for half in (pair.chosen, pair.rejected)])
        rows: list[tuple[Conversation, list[EncodedRow]]] = []
        questions = []
        for number, (pair, unread) in enumerate(pairs):
            halves = slice(2 * number, 2 * number + 2)
            issues.escaped += any(self.escaped[halves])
            try:
                chosen, rejected = map(_single_row, results[halves])
                if chosen == rejected:
                    raise RowError("identical answers", "`chosen` and `rejected` have the same tokens")
            except RowError as error:
                issues.add(error, file, pair.chosen.place)
                continue
            rows += [(pair.chosen, [chosen]), (pair.rejected, [rejected])]
            questions += [digest_instruction(half, pair.answer) for half in (pair.chosen, pair.rejected)]
            for left_out in self.left_out[halves]:
                unread |= left_out
            if unread:
                messages = pair.chosen.messages + pair.rejected.messages
                issues.add_unread(unread, messages, file, pair.chosen.place)
        return make_batch(file, rows, questions=questions, in_pairs=True), issues

    def _prove(self, rows: Sequence[tuple[Conversation, EncodedRow, int]], questions: Sequence[bytes]) -> None:
        """Compare joined tokens of a few siblings with those of the complete conversation. Raises UserError."""
        groups = defaultdict(list)
        for number, (question, (_, row, _)) in enumerate(zip(questions, rows, strict=True)):
            groups[sibling_key(question, _tokens(row))].append(number)
        siblings = [numbers for numbers in groups.values() if len(numbers) > 1][:_PROVEN]
        complete = []
        for first, second, *_ in siblings:
            (conversation, _, answer), (other, _, other_answer) = rows[first], rows[second]
            messages = [*conversation.messages]
            messages[answer] = other.messages[other_answer]
            complete.append(replace(conversation, messages=messages))
        for (first, second, *_), result in zip(siblings, self.encode(complete), strict=True):
            ids, trained = join_answer(_tokens(rows[first][1]), _tokens(rows[second][1]))
            whole = None if isinstance(result, RowError) or len(result) > 1 else result[0]
            if whole is None or not (np.array_equal(whole.ids, ids) and np.array_equal(whole.trained, trained)):
                prompt_row, answer_row = (_row_number(rows[number][0]) for number in (first, second))
                raise UserError(
                    f"rows can't be paired with their siblings: under this template the answer of row {answer_row} has "
                    f"other tokens after the prompt of row {prompt_row}. Write rows with `chosen` and `rejected`, or "
                    "choose another `chat.template`."
                )


def _row_number(conversation: Conversation) -> str:
    return "".join(filter(str.isdigit, conversation.place))


def _last_answer(conversation: Conversation) -> int:
    """Return the number of the answer that `train_on: last` trains."""
    messages = enumerate(conversation.messages)
    return max(number for number, message in messages if message["role"] == "assistant" and weight_of(message))


def _single_row(result: list[EncodedRow] | RowError) -> EncodedRow:
    if isinstance(result, RowError):
        raise result
    if len(result) > 1:
        detail = (
            "the template rewrites earlier turns, so one half becomes several rows; `chat.train_on: last` trains one"
        )
        raise RowError("several rows of one pair", detail)
    return result[0]


def _tokens(row: EncodedRow) -> Tokens:
    return row.ids, row.trained
