"""What one run of ``train`` consists of: its steps, checkpoints, log, signals, and the models it leaves behind."""
