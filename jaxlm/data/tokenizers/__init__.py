"""Tokenizers: text to token ids and back, in the formats of Hugging Face directories."""
