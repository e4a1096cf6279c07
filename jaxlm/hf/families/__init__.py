"""Tables of the Hugging Face model families: which fields and tensors are which of ours."""
