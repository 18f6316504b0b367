"""X-VLM: its model and its official checkpoints."""
