"""Layouts of quantized weights in Hugging Face model directories."""
