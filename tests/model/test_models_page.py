"""The examples of docs/models.md are lines of the package and of its tests."""

import re
from pathlib import Path

import jaxtrain

PACKAGE = Path(jaxtrain.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "models.md").read_text()


def test_every_example_of_the_page_stands_in_the_package():
    squeeze = lambda text: re.sub(r",(?=[\]})])", "", re.sub(r"\s|# fmt: \w+", "", text))
    rows = Path(__file__).parent / "tiny_models.py"
    files = [*sorted((PACKAGE / "model").glob("*.py")), rows]
    code = squeeze("".join(file.read_text() for file in files))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 4
    for block in blocks:
        assert squeeze(block) in code, block
