"""Chat templates: the sandbox that runs them, and what they may use."""
