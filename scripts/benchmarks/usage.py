"""Run a command and write down what it took: seconds, those on a processor, and the memory of its largest process.

    python scripts/benchmarks/usage.py '{"usage_file": "usage.json", "command": ["python", "script.py"]}'

A process of its own and a small one, as the kernel counts the memory of whoever starts a command as the command's.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run it; its exit code."""
    task = json.loads(sys.argv[1])
    started = time.monotonic()
    code = subprocess.call(task["command"])
    seconds = time.monotonic() - started
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1_024
    Path(task["usage_file"]).write_text(
        json.dumps(
            {
                "process_seconds": seconds,
                "cpu_seconds": used.ru_utime + used.ru_stime,
                "peak_memory": used.ru_maxrss * unit,
            }
        ),
        encoding="utf-8",
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
