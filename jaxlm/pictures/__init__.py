"""Pictures of trainings and models: a function each, from data to a matplotlib figure (``figure.savefig(path)``)."""
