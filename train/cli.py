"""TODO: train.cli."""

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from train.errors import UserError, names_of_files
from train.storage.local_paths import path_option


class _HelpFormatter(argparse.HelpFormatter):
    """Help whose paragraphs are wrapped at the terminal's width; indented ones (examples) keep their lines."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in paragraphs
        )


class CommandLine(argparse.ArgumentParser):
    """The parser that every command begins with.

    - Its errors look like all others: `error:` at the start of the line, below the usage.
    - Help is wrapped at the terminal's width; indented paragraphs (examples) keep their lines.
    - Options of `type=Path` take `~`, `$VAR` and `${VAR}`, as the keys of a recipe do.
    - From here on characters that the terminal or the log can't encode are escaped, in whatever is printed.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Take what ArgumentParser takes."""
        super().__init__(*args, **{"formatter_class": _HelpFormatter, **keywords})
        self.register("type", Path, path_option)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse; an argument that isn't text is an error."""
        return super().parse_known_args(self._checked(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Likewise."""
        return super().parse_known_intermixed_args(self._checked(args), namespace)

    def _checked(self, arguments: Sequence[str] | None) -> list[str]:
        escape_unencodable()
        words = sys.argv[1:] if arguments is None else list(arguments)
        for word in words:
            if not is_encodable(word):
                self.error(f"argument {os.fsencode(word)!r}: {_WHY_NOT_TEXT[_is_utf8(word)]}")
        return words

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


_WHY_NOT_TEXT = {
    False: "not UTF-8. Rename the file or folder that it names.",
    True: "this locale has no such characters. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1.",
}


def is_encodable(text: str) -> bool:
    """Return whether `text` is all characters: other bytes of a file's name are halves of surrogates in Python."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_utf8(word: str) -> bool:
    try:
        os.fsencode(word).decode()
    except UnicodeDecodeError:
        return False
    return True


def escape_unencodable() -> None:
    """Have standard output and standard error escape what they can't encode, as a container's ASCII can't most."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def positive(text: str) -> int:
    """A whole number from 1 up, as an option's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 up")
    return int(text)


def number_or_null(text: str) -> float | None:
    """A number, or null for what is not to be sent, as an option's `type`."""
    if text.lower() in ("null", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor null") from None


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, as an option's `type`."""
    try:
        value = json.loads(text, parse_constant=_no_number)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


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


def time_span(text: str) -> float:
    """Seconds, as an option's `type`: a number of them, or a duration such as 90s, 10m or 1h30m."""
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)
    units = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
    if not text or not re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: write seconds, or 90s, 10m, 1h30m")
    return float(sum(int(part[:-1]) * units[part[-1]] for part in re.findall(r"\d+[dhms]", text)))


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
        with names_of_files():
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
