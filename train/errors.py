"""What the user can mend: one exception, printed after `error:` with exit code 2, and the same for command lines and
for standard output that takes nothing."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, NoReturn, TextIO


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


class _HelpFormatter(argparse.HelpFormatter):
    """Help whose paragraphs are wrapped at the terminal's width; indented ones (examples) keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in paragraphs
        )


class CommandLine(argparse.ArgumentParser):
    """Parser of a command line: errors begin with `error:`, below the usage; help keeps the lines of examples."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"formatter_class": _HelpFormatter, **options})

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def positive(text: str) -> int:
    """A whole number from 1 up, as an option's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def from_one_to(most: int) -> Callable[[str], int]:
    """A whole number from 1 up to `most`, as an option's `type`."""

    def bounded(text: str) -> int:
        number = positive(text)
        if number > most:
            raise argparse.ArgumentTypeError(f"{number} is more than {most:,}, which is the most")
        return number

    return bounded


def not_negative(text: str) -> int:
    """A whole number from 0 up, as an option's `type`: numpy takes no other seed."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up")
    return int(text)


class OutputLostError(Exception):
    """Standard output can't be written; what it was caused by says why."""


class _Output:
    """Standard output whose own faults are told from those of any other file."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of any stream. Raises OutputLostError."""
        try:
            return self._stream.write(text)
        except OSError as fault:
            raise OutputLostError from fault

    def writelines(self, lines: Iterator[str]) -> None:
        """As of any stream. Raises OutputLostError."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """As of any stream. Raises OutputLostError."""
        try:
            self._stream.flush()
        except OSError as fault:
            raise OutputLostError from fault


def ending(act: Callable[[], None], stopped: str) -> int:
    """Run a command; its exit code, and one line on standard error where it didn't come to its end.

    2 there is something to mend: a UserError, or standard output that can't be written. 1 who read standard output has
    left, and knows it: not a word. 130 after Ctrl-C, where `stopped` is what is said. All else is raised.
    """
    stream = sys.stdout
    if stream is None:  # closed, and Python prints nothing
        return _ending(act, stopped)
    with redirect_stdout(_Output(stream)):
        code = _ending(act, stopped)
        try:
            sys.stdout.flush()
        except OutputLostError as lost:
            code = code or _told_of(lost)
            # Python flushes once more as it ends, and would print a traceback for it.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _ending(act: Callable[[], None], stopped: str) -> int:
    try:
        act()
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except OutputLostError as lost:
        return _told_of(lost)
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    return 0


def _told_of(lost: OutputLostError) -> int:
    if isinstance(lost.__cause__, BrokenPipeError):
        return 1
    why = getattr(lost.__cause__, "strerror", None)
    print(f"error: standard output can't be written: {why}.", file=sys.stderr)
    return 2
