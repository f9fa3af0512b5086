"""Tokenizers: read from a folder, the hub or a GGUF file, written for export."""

from jaxtrain.tokenizer.load import HFTokenizerFactory as HFTokenizerFactory
from jaxtrain.tokenizer.load import TokenizerFactory as TokenizerFactory
from jaxtrain.tokenizer.load import load_tokenizer as load_tokenizer
from jaxtrain.tokenizer.load import save_tokenizer as save_tokenizer
