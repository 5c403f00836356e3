r"""Generate system messages for rows without one, and new answers that follow them (SYSGEN, arXiv:2502.11330).

    vllm serve Qwen/Qwen2.5-14B-Instruct      # any OpenAI-compatible server
    python scripts/sysgen.py \
        --config recipes/sysgen/qwen2.5-14b-instruct.yaml

Every answer of a server is journaled at once: after Ctrl-C or the loss of the machine, the same command continues and
repeats no request. The rows are in OUTPUT_DIR/data, which train/sft.py reads, and the figures in OUTPUT_DIR/report.md.
--check reads the configuration and all rows, and asks each server for one token with the settings of each stage. Exit
codes are those of train/sft.py; 2 also if no row was written, or rows were lost for a reason that no setting accepts
(see `accept_losses`); 130 after Ctrl-C.
"""

import sys
from collections import Counter

try:
    from train.data.sources.formats import RowError
    from train.datagen import command
    from train.datagen.drop_reasons import format_drop_reasons
    from train.datagen.source_rows import iter_rows
    from train.errors import UserError
    from train.sysgen.config import SysgenConfig, load_config
    from train.sysgen.run import run
except KeyboardInterrupt:  # the imports take a second or more
    sys.exit(130)


def check(config: SysgenConfig) -> None:
    """Read all rows and print what a run would do. Raises UserError."""
    rows = with_system = requests = 0
    errors: Counter[str] = Counter()
    for _, _, row in iter_rows(config.data):
        rows += 1
        if isinstance(row, RowError):
            errors[row.kind] += 1
            continue
        has_system = row.messages[0]["role"] == "system"
        with_system += has_system
        if has_system and config.existing_system == "keep":
            continue
        turns = sum(message["role"] == "assistant" for message in row.messages)
        requests += 1 + turns if config.message == "generate" else 0
        requests += turns * ((config.answers == "anew") + config.gates.judge)
    print(f"{rows:,} rows, {with_system:,} with a system message (existing_system: {config.existing_system})")
    for kind, count in errors.most_common():
        print(f"warning: {count:,} rows can't be read: {kind}")
    if rows == errors.total():
        raise UserError(f"no row can be read: {format_drop_reasons(rows, errors)}. Correct the data, or name others.")
    concurrency = sum(server.concurrency for server in config.servers)
    requests += round((rows - errors.total()) * config.pressure.mean_further_answers())
    print(f"about {requests:,} requests to {config.model}, {concurrency:,} at once, if every first try passes")


def main() -> int:
    """Run the command and return its exit code."""
    return command.main(__doc__, load_config, check, run)


if __name__ == "__main__":
    sys.exit(main())
