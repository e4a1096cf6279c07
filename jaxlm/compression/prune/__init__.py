"""Steps that set weights to zero, or remove heads, channels, experts, layers or width."""
