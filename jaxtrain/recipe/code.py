"""Imports the Python file that a recipe names, once, and reports its errors by line."""

import ast
import hashlib
import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

from jaxtrain import registry
from jaxtrain.recipe.errors import Fault, Place, RecipeError

UPSTREAM = "arctic_training"

_texts: dict[Path, dict[Path, bytes]] = {}
"""File that was run → the text of it and of what it imported from its folder."""


def run_user_code(file: Path) -> None:
    """Imports a user's Python file, again only if it or what it imports from its folder has
    changed. RecipeError names the failing line.

    Files of one name in two folders are two modules, and so is what they import.
    """
    file = file.resolve()
    if file in _texts and all(
        path.is_file() and path.read_bytes() == text for path, text in _texts[file].items()
    ):
        return
    _forget_namesakes(file.parent)
    folder = str(file.parent)
    sys.path[:] = [folder, *(path for path in sys.path if path != folder)]
    name = module_name(file)
    loader = SourceFileLoader(name, str(file))  # whatever the suffix
    module = module_from_spec(spec_from_loader(name, loader))  # type: ignore[arg-type]
    sys.modules[name] = module
    upstream = sys.modules.get(UPSTREAM)
    sys.modules[UPSTREAM] = None  # type: ignore[assignment] # its classes would register nowhere
    try:
        loader.exec_module(module)
        registry.settle()
    except BaseException as error:  # whatever the file raises, the user gets its line
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        raise RecipeError([_fault(error, file)]) from error
    finally:
        del sys.modules[UPSTREAM]
        if upstream is not None:
            sys.modules[UPSTREAM] = upstream
    beside = _modules_in(file.parent).values()
    _texts[file] = {path: path.read_bytes() for path in {file, *beside}}


def module_name(file: Path) -> str:
    """The name of a user's module, which differs between folders."""
    return f"jaxtrain_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"


def find_user_files(pickled: bytes) -> list[Path]:
    """Files that another process has to run before it can unpickle `pickled`."""
    return [file for file in _texts if module_name(file).encode() in pickled]


def _forget_namesakes(folder: Path) -> None:
    """Removes imported modules of users whose names are taken in `folder`, so that a file there
    imports those beside it as they are now."""
    here = {path.stem for path in folder.iterdir()}
    for known in {file.parent for file in _texts} | {folder}:
        for name in _modules_in(known):
            if name.split(".")[0] in here:
                del sys.modules[name]


def _modules_in(folder: Path) -> dict[str, Path]:
    """Modules that were imported from a user's folder, with their files."""
    found = {name: getattr(module, "__file__", None) for name, module in sys.modules.items()}
    places = {name: folder.joinpath(*name.split(".")) for name in found}
    return {
        name: Path(file)
        for name, file in found.items()
        if file in (f"{places[name]}.py", str(places[name] / "__init__.py"))
        if name.split(".")[0] != "jaxtrain"
    }


def _fault(error: BaseException, file: Path) -> Fault:
    """The error in one line, at the innermost place in the user's files."""
    what = f"{type(error).__name__}: {error}".partition("\n")[0]
    if isinstance(error, SyntaxError):
        return Fault("", what, Place(error.filename or str(file), error.lineno or 0))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).is_relative_to(file.parent)]
    place = Place(own[-1].filename, own[-1].lineno or 0) if own else Place(str(file), 0)
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and missing.split(".")[0] == UPSTREAM:
        what = f"imports {UPSTREAM}; write `{_import_instead(place)}`"
    return Fault("", what, place)


def _import_instead(place: Place) -> str:
    for node in ast.walk(ast.parse(Path(place.file).read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.lineno == place.line:
            return f"from jaxtrain import {', '.join(alias.name for alias in node.names)}"
    return "import jaxtrain"
