"""Sources: what a SPEC names, opened and checked."""
