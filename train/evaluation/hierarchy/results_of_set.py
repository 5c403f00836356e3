"""Results of one set of rows: its figures, its rows, and its lines of the table that all sets share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.resampling import Estimate


@dataclass(frozen=True)
class TablePart:
    """A line of the table of settings; columns that a set does not measure are None.

    - `rows`: number of rows of the shares.
    - `held`: share of the answers that do what the system message says.
    - `answered`, `both`: share with the known answer, and with both.
    - `difference`: held, minus that of the line that it is paired with: the reference setting, or the user turn.
    """

    name: str
    rows: int
    held: Estimate | None = None
    answered: Estimate | None = None
    both: Estimate | None = None
    difference: Estimate | None = None

    def record(self) -> dict[str, Any]:
        """Return the line for JSON."""
        shares = {name: share_record(getattr(self, name)) for name in ("held", "answered", "both")}
        difference = self.difference.record() if self.difference else None
        return {"name": self.name, "rows": self.rows, **shares, "difference": difference}


@dataclass(frozen=True)
class SetResults:
    """Results of one set of rows.

    - `name`: the key of `record` in hierarchy.json, and `set` of the rows.
    - `rows`: lines of hierarchy_rows.jsonl; every figure of `record` can be computed from them.
    - `parts`: lines of the table.
    - `settings`: a paragraph on rows and decoding; `details`: Markdown below the table.
    - `warning`: a sentence on missing answers; empty if there are none.
    """

    name: str
    record: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    parts: Sequence[TablePart]
    settings: str
    details: str = ""
    warning: str = ""


def share_record(share: Estimate | None) -> dict[str, Any] | None:
    """Return a share for JSON. It is not tested against zero, so it has no p."""
    if share is None:
        return None
    return {
        "value": share.mean,
        "low": share.low,
        "high": share.high,
        "groups": share.groups,
        "interval": share.interval,
    }
