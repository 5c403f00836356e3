"""Published data that is no part of the project: the folder that the environment variable JANUS_TEST_DATA names.

Each test on it skips without it and has a twin on data of the project.
"""

import os
from pathlib import Path

FOLDER = Path(os.environ.get("JANUS_TEST_DATA", "not-there"))
ABSENT = "JANUS_TEST_DATA names no folder with this file"
