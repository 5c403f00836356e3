"""The warning of a run in which most replies held no verdict that could be read."""

from train.progress import counted


def unread_warning(what: str, unread: int, asked: int, consequence: str) -> list[str]:
    """Return one line where more than half of the verdicts were unread, else none.

    Args:
        what: the stage or setting that asked, which the line starts with.
        unread, asked: numbers of verdicts.
        consequence: what was done with the rows, and what to do now.
    """
    if 2 * unread <= asked:
        return []
    return [
        f"{what}: {unread:,} of {counted(asked, 'verdict')} could not be read ({unread / asked:.0%}). {consequence}"
    ]
