r"""Give rows without system messages the ones that fit them, and answer them anew (SYSGEN, arXiv:2502.11330).

    vllm serve Qwen/Qwen2.5-14B-Instruct      # any OpenAI-compatible server
    python scripts/sysgen.py \
        --config recipes/sysgen/qwen2.5-14b-instruct.yaml

What a server answers is written down at once: stop it with Ctrl-C or lose the machine, and the same command goes on
where it was, asking nothing twice. The rows are in OUTPUT_DIR/data, which train/sft.py reads as it is; what they amount
to in OUTPUT_DIR/report.md. --check reads the configuration and all rows, and asks each server for one token with the
settings of each stage. Exit codes as of train/sft.py; 2 also where no row is left to train on, or rows were lost for a
reason that no setting accepts (see `accept_losses`); 130 after Ctrl-C.
"""

import sys
from collections import Counter

try:
    from train.data.sources.formats import RowError
    from train.datagen import command
    from train.datagen.source_rows import iter_rows
    from train.errors import UserError
    from train.sysgen.config import SysgenConfig, load_config
    from train.sysgen.run import run
    from train.sysgen.stats import Tally
except KeyboardInterrupt:  # the imports take a second or more
    sys.exit(130)


def check(config: SysgenConfig) -> None:
    """Say what a run would do, after reading every row. Raises UserError."""
    rows = with_system = requests = 0
    faults: Counter[str] = Counter()
    for _, _, row in iter_rows(config.data):
        rows += 1
        if isinstance(row, RowError):
            faults[row.kind] += 1
            continue
        with_system += row.messages[0]["role"] == "system"
        turns = sum(message["role"] == "assistant" for message in row.messages)
        if row.messages[0]["role"] == "system" and config.existing_system == "keep":
            continue
        requests += 1 + turns if config.message == "generate" else 0
        requests += turns * ((config.answers == "anew") + config.gates.judge)
    print(f"{rows:,} rows, {with_system:,} of them with a system message (existing_system: {config.existing_system})")
    for kind, count in faults.most_common():
        print(f"warning: {count:,} rows can't be read: {kind}")
    places = sum(server.concurrency for server in config.servers)
    if rows == faults.total():
        raise UserError(f"no row can be read: {command.went(rows, faults)}. Mend the data, or name other sources.")
    print(f"about {requests:,} requests to {config.model}, {places:,} at once, if every row passes at the first try")


def tell(tally: Tally, time: str) -> None:
    """Print what became of the rows."""
    print(f"{tally.written:,} of {tally.rows:,} rows written after {time}")
    for reason, count in tally.left_out.most_common():
        print(f"left out: {count:,} ({count / tally.rows:.1%}): {reason}")


def lost(tally: Tally) -> Counter[str]:
    """How many rows each reason left out."""
    return tally.left_out


def asked_stages(config: SysgenConfig) -> list[str]:
    """Return the stages that a run asks for."""
    asked = {
        "generate": config.message == "generate",
        "verify": config.message == "generate",
        "answer": config.answers == "anew",
        "judge": config.gates.judge,
    }
    return [stage for stage, is_asked in asked.items() if is_asked]


def main() -> int:
    """Run the command; the exit code."""
    return command.main(__doc__, load_config, check, run, tell, lost, asked_stages)


if __name__ == "__main__":
    sys.exit(main())
