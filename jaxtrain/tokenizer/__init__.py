from jaxtrain.tokenizer.load import load_tokenizer as load_tokenizer
from jaxtrain.tokenizer.load import save_tokenizer as save_tokenizer
