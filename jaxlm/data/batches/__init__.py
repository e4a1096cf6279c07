"""Token ids, batches of them, and loaders."""
