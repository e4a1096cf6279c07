"""Tables of decoders that are made of general parts, a file for each lineage."""
