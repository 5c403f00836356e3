"""Resource usage of a command: wall-clock seconds, CPU seconds and the memory of its largest process.

    python -m benchmarks.usage '{"usage_file": "usage.json", "command": ["python", "script.py"]}'

A small process of its own: the kernel counts the memory of the process that starts a command as the command's.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Run the command, write its usage and return its exit code."""
    task = json.loads(sys.argv[1])
    started = time.monotonic()
    code = subprocess.call(task["command"])
    seconds = time.monotonic() - started
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1_024
    Path(task["usage_file"]).write_text(
        json.dumps(
            {
                "process_seconds": seconds,
                "cpu_seconds": usage.ru_utime + usage.ru_stime,
                "peak_memory": usage.ru_maxrss * unit,
            }
        ),
        encoding="utf-8",
    )
    return code


if __name__ == "__main__":
    sys.exit(main())
