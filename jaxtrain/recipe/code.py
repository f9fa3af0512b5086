"""The Python file that a recipe names: imported once, its faults said by line."""

import importlib.util
import sys
import traceback
from pathlib import Path

from jaxtrain import registry
from jaxtrain.recipe.errors import Fault, Place, RecipeError


def run_user_code(file: Path) -> None:
    """Import a user's Python file once, with its folder on the path; RecipeError names the
    failing line."""
    file = file.resolve()
    name = f"jaxtrain_user_{file.stem}"
    module = sys.modules.get(name)
    if module is not None and getattr(module, "__file__", None) == str(file):
        return
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        registry.settle()
    except BaseException as error:  # whatever the user's file raises, the person gets its line
        del sys.modules[name]
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = frames[-1].lineno if frames else getattr(error, "lineno", 0)
        place = Place(str(file), line or 0)
        raise RecipeError([Fault("", f"{type(error).__name__}: {error}", place)]) from error
