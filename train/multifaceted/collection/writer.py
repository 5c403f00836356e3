"""Writer of the collection's files, in the order of the sources.

data/rows.jsonl, or data/rows-00000.parquet, ...    training rows: `path: OUTPUT_DIR/data` in a recipe
pairs/rows.jsonl, or pairs/rows-00000.parquet, ...  preference pairs
left_out.jsonl                                      all dropped instructions and sets, each with the reason
"""

from pathlib import Path

import pyarrow

from train.datagen.dataset_writer import LEFT_OUT, DatasetWriter
from train.multifaceted.collection.config import CollectionConfig
from train.multifaceted.collection.result import InstructionResult, build_dropped_rows, build_pairs, build_rows
from train.pressure.generated import RECORD_FIELDS

DATA, PAIRS = "data", "pairs"
OUTPUTS = (DATA, PAIRS, LEFT_OUT)


def _strings(*names: str) -> list[tuple[str, pyarrow.DataType]]:
    return [(name, pyarrow.string()) for name in names]


_PREFERENCE = pyarrow.struct(_strings("dimension", "subdimension", "preference", "description"))
_TURNS = pyarrow.list_(pyarrow.struct(_strings("content", "role")))
ROW_SCHEMA = pyarrow.schema(
    [
        *_strings("main_source", "original_source"),
        ("preference_set", pyarrow.list_(_PREFERENCE)),
        *_strings("system", "prompt", "output"),
    ]
)
PRESSURE_ROW_SCHEMA = ROW_SCHEMA.append(
    pyarrow.field("history", pyarrow.list_(pyarrow.list_(pyarrow.string())))
).append(pyarrow.field("pressure", pyarrow.struct(_strings(*RECORD_FIELDS))))
"""Schema of a run with rows under pressure."""
PAIR_SCHEMA = pyarrow.schema(
    [*_strings("main_source", "original_source", "system", "prompt"), ("chosen", _TURNS), ("rejected", _TURNS)]
)


class CollectionWriter(DatasetWriter):
    """Writer of instruction results."""

    def __init__(self, config: CollectionConfig) -> None:
        self._config = config
        folder = Path(config.output_dir)
        schemas = {DATA: PRESSURE_ROW_SCHEMA if config.pressure.is_on else ROW_SCHEMA}
        if config.pairs != "none" or (folder / PAIRS).exists():  # pairs of an earlier run must be removed
            schemas[PAIRS] = PAIR_SCHEMA
        super().__init__(folder, config.output, schemas)

    def write_result(self, result: InstructionResult) -> int:
        """Write the rows, pairs and dropped rows of one instruction; return the number of pairs. Raises UserError."""
        pairs = build_pairs(result, self._config.pairs, self._config.seed)
        self.write(DATA, build_rows(result, has_pressure=self._config.pressure.is_on))
        if pairs:
            self.write(PAIRS, pairs)
        self.write(LEFT_OUT, build_dropped_rows(result))
        return len(pairs)
