"""Models behind HTTP: OpenAI's interface, translation, insight, and a page. ``jaxlm.serve`` starts it."""
