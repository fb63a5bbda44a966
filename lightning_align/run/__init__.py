"""What a run leaves behind: its directory, logs, checkpoints, and the exact way back into them."""
