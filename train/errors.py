"""User errors: one exception for everything the user can fix, printed after `error:` with exit code 2."""

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

USER_FIXABLE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN}
"""Errors of a disk that is full, read-only or unreachable."""


class UserError(Exception):
    """Error in the recipe, the data, the template or the machine that the user can fix.

    The message is one paragraph without the leading `error:`. It names the file, key or row, says what is allowed
    and what to write instead.
    """


class MachineError(UserError):
    """Device or package that this machine lacks; a run on another machine may have it.

    `reason`: the message without the sentence on what to do.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        """Join both to the message."""
        super().__init__(f"{reason}. {remedy}")
        self.reason = reason


@contextmanager
def noted_elsewhere(notes: list[str], *, elsewhere: bool) -> Iterator[None]:
    """Add a MachineError raised inside to `notes` if the run will be on another machine."""
    try:
        yield
    except MachineError as error:
        if not elsewhere:
            raise
        notes.append(f"not checked on this machine: {error.reason}")


@contextmanager
def replace_in_errors(replacements: Mapping[str, str]) -> Iterator[None]:
    """Replace terms in UserErrors raised inside, so that they name what the user typed (an option for a recipe key).

    Only the last occurrence of each key of `replacements` is replaced. Text quoted from a server may contain the same
    word: use a phrase where that is possible.
    """
    try:
        yield
    except UserError as error:
        text = str(error)
        for term, replacement in replacements.items():
            before, separator, after = text.rpartition(term)
            text = f"{before}{replacement}{after}" if separator else text
        raise UserError(text) from error


@contextmanager
def convert_encoding_errors() -> Iterator[None]:
    """Raise UserError where this locale's encoding can't represent a file name, as ASCII can't represent `é`."""
    try:
        yield
    except UnicodeEncodeError as error:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        raise UserError(
            f"this locale ({error.encoding}) can't represent {error.object!r}. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
        ) from error
