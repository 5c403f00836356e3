"""What the user can mend: one exception, printed after `error:` with exit code 2, and the same for command lines."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn


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


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose errors look like all others: `error:` at the start of the line, below the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """A whole number from 1 up, as an option's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)
