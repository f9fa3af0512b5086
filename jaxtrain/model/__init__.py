"""One decoder, its families as data, and its weights in and out of Hugging Face folders."""
