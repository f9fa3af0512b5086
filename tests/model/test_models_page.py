"""The examples of docs/models.md are the package's own lines."""

import re
from pathlib import Path

import jaxtrain

PACKAGE = Path(jaxtrain.__file__).parent
PAGE = (PACKAGE.parent / "docs" / "models.md").read_text()


def test_every_example_of_the_page_stands_in_the_package():
    squeeze = lambda text: re.sub(r",(?=[\]})])", "", re.sub(r"\s|# fmt: \w+", "", text))
    code = squeeze("".join(file.read_text() for file in sorted((PACKAGE / "model").glob("*.py"))))
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert len(blocks) == 3
    for block in blocks:
        assert squeeze(block) in code, block
