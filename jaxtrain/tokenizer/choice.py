"""The class that AutoTokenizer chose for a folder, kept for the next start.

To choose, it reads the model's description, for which transformers imports torch where that is
installed: seconds that the class itself does without.
"""

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxtrain.assets import cache_folder
from jaxtrain.files import write_atomically
from jaxtrain.recipe.errors import RecipeError

DESCRIPTIONS = ("config.json", "tokenizer_config.json")


def recall_class(folder: Path) -> Any:
    """None where nothing is known of the folder as it is now."""
    import transformers

    try:
        name = _place(folder).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, RecipeError):
        return None
    found = getattr(transformers, name, None)
    is_tokenizer = isinstance(found, type) and issubclass(
        found, transformers.PreTrainedTokenizerFast
    )
    return found if is_tokenizer else None


def remember_class(folder: Path, chosen: type) -> None:
    import transformers

    if getattr(transformers, chosen.__name__, None) is chosen:
        try:
            place = _place(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, chosen.__name__)
        except (OSError, RecipeError):  # without a cache the next start takes longer, and no more
            return


def _place(folder: Path) -> Path:
    """A file in the cache, named after what the choice depends on."""
    digest = hashlib.sha256(f"{version('transformers')} {folder.resolve()}".encode())
    for file in sorted(folder.iterdir()):
        facts = file.stat()
        digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns} ".encode())
        if file.name in DESCRIPTIONS:
            digest.update(file.read_bytes())
    return cache_folder() / "tokenizers" / digest.hexdigest()
