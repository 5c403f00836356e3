r"""Build a collection of system messages with different preferences for the same instruction (arXiv:2405.17977).

    vllm serve Qwen/Qwen2.5-14B-Instruct      # any OpenAI-compatible server
    python scripts/collection.py \
        --config recipes/collection/qwen2.5-14b-instruct.yaml

Every answer of a server is journaled at once: after Ctrl-C or the loss of the machine, the same command continues and
repeats no request. The rows are in OUTPUT_DIR/data, in the columns of Multifaceted Collection, which train/sft.py
reads; preference pairs are in OUTPUT_DIR/pairs, and the figures in OUTPUT_DIR/report.md. --check reads the
configuration, the hierarchy and all rows, and asks each server for one token with the settings of each stage. Exit
codes are those of train/sft.py; 2 also if no row was written, or rows were lost for a reason that no setting accepts
(see `accept_losses`); 130 after Ctrl-C.
"""

import sys
from collections import Counter

try:
    from train.datagen import command
    from train.datagen.drop_reasons import format_drop_reasons
    from train.datagen.run import open_near_duplicate_filter
    from train.errors import UserError
    from train.multifaceted.collection.config import CollectionConfig, load_config
    from train.multifaceted.collection.hierarchy import PreferencePlan, load_hierarchy
    from train.multifaceted.collection.instructions import iter_instructions
    from train.multifaceted.collection.run import run
except KeyboardInterrupt:  # the imports take a second or more
    sys.exit(130)


def check(config: CollectionConfig) -> None:
    """Read the hierarchy and all rows, and print what a run would do. Raises UserError."""
    hierarchy = load_hierarchy(config.hierarchy.file, ours=config.hierarchy.ours)
    PreferencePlan(hierarchy, config.sets_per_instruction, config.seed)
    subdimensions = [sub for by_name in hierarchy.values() for sub in by_name.values()]
    preferences = sum(len(sub.preferences) for sub in subdimensions)
    print(f"hierarchy: {len(hierarchy)} dimensions, {len(subdimensions):,} sub-dimensions, {preferences:,} preferences")
    rows = kept = 0
    drop_counts: Counter[str] = Counter()
    events: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with open_near_duplicate_filter(config.filter.near_duplicates) as near_duplicates:
        for instruction in iter_instructions(config.data, config.filter, near_duplicates):
            rows += 1
            kept += instruction.number is not None
            events.update(instruction.events)
            if instruction.reason is not None:
                drop_counts[instruction.reason] += 1
                detail = f": {instruction.detail}" if instruction.detail else ""
                examples.setdefault(instruction.reason, f"{instruction.place}{detail}")
    print(f"{rows:,} rows, {kept:,} instructions")
    for event, count in events.most_common():
        print(f"{count:,} times: {event}")
    for reason, count in drop_counts.most_common():
        print(f"dropped: {count:,} ({count / rows:.1%}): {reason}; the first: {examples[reason]}")
    if not kept:
        raise UserError(
            f"no row becomes an instruction: {format_drop_reasons(rows, drop_counts)}. Correct the data, or change the "
            "settings of `filter`."
        )
    sets = kept * config.sets_per_instruction
    requests = sets * (4 if config.preferences == "proposed" else 3) + kept * config.filter.model
    requests += round(sets * config.pressure.mean_answers_after_plain())
    concurrency = sum(server.concurrency for server in config.servers)
    print(
        f"about {requests:,} requests to {config.model}, {concurrency:,} at once, for {sets:,} sets, if every first "
        "try passes"
    )


def main() -> int:
    """Run the command and return its exit code."""
    return command.main(__doc__, load_config, check, run)


if __name__ == "__main__":
    sys.exit(main())
