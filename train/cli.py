"""Command-line parsing and exit codes, shared by all commands."""

import argparse
import gc
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from train.errors import UserError, convert_encoding_errors
from train.storage.local_paths import parse_path


class _HelpFormatter(argparse.HelpFormatter):
    """Help formatter that wraps paragraphs at the terminal's width and keeps the lines of indented ones (examples)."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            part if part.startswith(" ") else super(_HelpFormatter, self)._fill_text(part, width, indent)
            for part in paragraphs
        )


class CommandLine(argparse.ArgumentParser):
    """Argument parser of all commands.

    - Usage errors end with exit code 2 and a line that starts with `error:`.
    - Help is wrapped at the terminal's width; indented paragraphs (examples) keep their lines.
    - Options of `type=Path` expand `~`, `$VAR` and `${VAR}`, like the keys of a recipe.
    - Parsing makes standard output and standard error escape characters that their encoding lacks.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        """Accept the arguments of ArgumentParser."""
        super().__init__(*args, **{"formatter_class": _HelpFormatter, **keywords})
        self.register("type", Path, parse_path)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, after checking that all arguments are valid text."""
        return super().parse_known_args(self._checked(args), namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse like argparse, after checking that all arguments are valid text."""
        return super().parse_known_intermixed_args(self._checked(args), namespace)

    def _checked(self, arguments: Sequence[str] | None) -> list[str]:
        escape_unencodable()
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        for argument in arguments:
            if not is_encodable(argument):
                self.error(f"argument {os.fsencode(argument)!r}: {_ENCODING_ADVICE[_is_utf8(argument)]}")
        return arguments

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, and exit with code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


_ENCODING_ADVICE = {
    False: "not UTF-8. Rename the file or folder.",
    True: "this locale can't represent these characters. Set LC_ALL=C.UTF-8, or PYTHONUTF8=1.",
}


def is_encodable(text: str) -> bool:
    """Return whether `text` can be encoded; Python represents undecodable bytes of file names as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_utf8(argument: str) -> bool:
    try:
        os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return False
    return True


def escape_unencodable() -> None:
    """Make standard output and error escape characters that their encoding lacks (ASCII in many containers)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="backslashreplace")


def positive_int(text: str) -> int:
    """Parse an integer >= 1; an option's `type`."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 1")
    return int(text)


def non_negative_int(text: str) -> int:
    """Parse an integer >= 0, such as a seed of numpy; an option's `type`."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= 0")
    return int(text)


def positive_float(text: str) -> float:
    """Parse a finite number > 0; an option's `type`."""
    number = non_negative_float(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number > 0")
    return number


def non_negative_float(text: str) -> float:
    """Parse a finite number >= 0; an option's `type`."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number >= 0")
    return number


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; an option's `type`."""
    try:
        value = json.loads(text, parse_constant=_reject_constant)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} must be a JSON object")
    return value


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not a JSON number")


def duration_seconds(text: str) -> float:
    """Parse seconds, or a duration such as 90s, 10m or 1h30m; an option's `type`."""
    if re.fullmatch(r"\d+(\.\d+)?", text, re.ASCII):
        return float(text)
    units = {"d": 86_400, "h": 3_600, "m": 60, "s": 1}
    if not text or not re.fullmatch(r"(\d+d)?(\d+h)?(\d+m)?(\d+s)?", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} must be a duration: seconds, or 90s, 10m, 1h30m")
    return float(sum(int(part[:-1]) * units[part[-1]] for part in re.findall(r"\d+[dhms]", text)))


class OutputLostError(Exception):
    """Standard output can't be written. `reader_left`: it is a pipe whose reader has exited."""

    def __init__(self, error: OSError) -> None:
        """Wrap the error of the stream."""
        super().__init__(f"standard output can't be written: {error.strerror}.")
        self.reader_left = isinstance(error, BrokenPipeError)


class _GuardedOutput:
    """Standard output that raises OutputLostError, to tell its errors from those of other files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`. Raises OutputLostError."""
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputLostError(error) from error

    def writelines(self, lines: Iterable[str]) -> None:
        """Write all lines. Raises OutputLostError."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream. Raises OutputLostError."""
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLostError(error) from error


def print_error(message: object) -> None:
    """Print one paragraph to standard error, behind `error:`."""
    print(f"error: {message}", file=sys.stderr, flush=True)


def run_command(
    command: Callable[[], object],
    interrupted: str,
    *,
    guard_output: bool = True,
    on_user_error: Callable[[UserError], None] = print_error,
    user_fixable_errnos: Collection[int] = (),
) -> int:
    """Run `command` and return its exit code; exceptions not listed here propagate.

    - 0: done.
    - 1: the reader of standard output has exited, as in `... | head`; nothing is printed.
    - 2: UserError, or standard output can't be written; one line on standard error.
    - 130: Ctrl-C; prints `interrupted`.

    Args:
        command: the work, without arguments. Its return value is ignored.
        interrupted: the line printed on Ctrl-C.
        guard_output: handle errors of standard output. False for training, which must not stop silently.
        on_user_error: how a UserError is reported, for commands that run on several ranks.
        user_fixable_errnos: errnos of OSErrors that are printed with exit code 2 instead of raised.
    """

    def run() -> int:
        try:
            with convert_encoding_errors():
                command()
        except UserError as error:
            on_user_error(error)
            return 2
        except OutputLostError as error:
            return _report_lost_output(error)
        except OSError as error:
            if error.errno not in user_fixable_errnos:
                raise
            print_error(f"{error.filename or 'a file'}: {error.strerror}. Fix this and start again.")
            return 2
        except KeyboardInterrupt:
            print(interrupted, file=sys.stderr, flush=True)
            return 130
        return 0

    stream = sys.stdout
    if stream is None or not guard_output:  # None: closed, and Python prints nothing
        return run()
    with redirect_stdout(_GuardedOutput(stream)):
        code = run()
        try:
            sys.stdout.flush()
        except OutputLostError as error:
            code = code or _report_lost_output(error)
            # Python flushes again at exit and would print a traceback.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import packages without garbage collections, which find nothing then and take a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Run the `main` of a command and exit with its code, without Python's last garbage collection.

    It would look at every object of every imported package, more than a second, and free what ends anyway.
    """
    code = main()
    gc.freeze()
    sys.exit(code)


def _report_lost_output(error: OutputLostError) -> int:
    if error.reader_left:
        return 1
    print_error(error)
    return 2
