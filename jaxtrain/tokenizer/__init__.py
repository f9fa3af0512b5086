"""Tokenizers: read from a folder, the hub or a GGUF file, written for export."""

from jaxtrain.tokenizer.factory import HFTokenizerFactory as HFTokenizerFactory
from jaxtrain.tokenizer.factory import TokenizerFactory as TokenizerFactory
from jaxtrain.tokenizer.load import load_tokenizer as load_tokenizer
from jaxtrain.tokenizer.load import save_tokenizer as save_tokenizer
from jaxtrain.tokenizer.model_files import ModelFiles as ModelFiles
from jaxtrain.tokenizer.model_files import find_model_files as find_model_files
