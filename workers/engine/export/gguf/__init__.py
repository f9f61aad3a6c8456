"""GGUF, the format of llama.cpp: bit layouts of its blocks, header, tokenizer, a streamed writer, and a reader."""
