"""What the user can mend: one exception, printed after `error:` with exit code 2, and the same for command lines and
for standard output that takes nothing."""

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

USER_FIXABLE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN}
"""Errors of a disk that is full, read-only or gone."""


class UserError(Exception):
    """A fault in the recipe, the data, the template or the machine that the person at the keyboard can mend.

    The message is one paragraph without the leading `error:`. It names the file, key or row, says what is allowed
    and what to write instead.
    """


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Errors from inside name what the user typed: `options` holds words of theirs, and what is said in their place.

    Of a word that is there several times the last one is meant. A server that an error quotes may say the same word:
    where that can be, give a phrase.
    """
    try:
        yield
    except UserError as fault:
        text = str(fault)
        for key, option in options.items():
            before, found, after = text.rpartition(key)
            text = f"{before}{option}{after}" if found else text
        raise UserError(text) from fault


@contextmanager
def names_of_files() -> Iterator[None]:
    """Raise UserError where a file's name can't be written in the encoding of this locale, as `é` in ASCII."""
    try:
        yield
    except UnicodeEncodeError as fault:
        if sys.getfilesystemencoding() == "utf-8":
            raise
        raise UserError(
            f"this locale ({fault.encoding}) can't write {fault.object!r}. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1."
        ) from fault
