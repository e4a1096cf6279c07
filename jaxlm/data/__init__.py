"""Text, tokens and sentence pairs: where they come from (``sources``), what they become (``tokenizer``, ``packing``,
``bitext``) and how they reach the model (``loader``). Only ``loader`` imports grain."""
