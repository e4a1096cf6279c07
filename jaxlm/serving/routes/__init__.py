"""The endpoints that compute: one file each, and generation.py for what completions and chat share."""
