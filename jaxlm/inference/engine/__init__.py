"""The engine: scheduler, paged cache, compiled programs, speculative decoding and constraints."""
