"""Steps that store weights and activations in fewer bits."""
