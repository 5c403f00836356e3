"""Names of sources in metrics and reports: short, and each of them once."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from train.data.sources.readers import extension_of
from train.recipe import Source
from train.storage.local_paths import looks_like_hub_id


def name_sources(sources: Sequence[Source]) -> list[str]:
    """Return a name for each source: a file's without its extension, a folder's, or the id on the hub.

    Sources of the same name are named by their path; of the same path, with configuration and split; then by number.
    """
    names = [_short_name(source.path) for source in sources]
    paths = [source.path for source in sources]
    splits = [f"{source.path}{f':{source.name}' if source.name else ''}[{source.split}]" for source in sources]
    numbers = [f"{split} {number}" for number, split in enumerate(splits, 1)]
    for longer_names in (paths, splits, numbers):
        counts = Counter(names)
        names = [
            longer if counts[name] > 1 else name for name, longer in zip(names, longer_names, strict=True)
        ]  # fmt: skip
    return names


def _short_name(text: str) -> str:
    path = Path(text)
    if path.is_dir():
        return path.name or text
    if not path.exists() and (glob.has_magic(text) or looks_like_hub_id(text)):
        return text
    extension = extension_of(path)
    return path.name[: path.name.lower().find(extension)] if extension else path.name
