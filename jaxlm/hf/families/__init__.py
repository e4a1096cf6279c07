"""Tables of the Hugging Face model families: how their fields and tensors become jaxlm's."""
