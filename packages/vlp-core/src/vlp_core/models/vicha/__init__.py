"""ViCHA, and ALBEF, which is ViCHA without its additions: the model and its official checkpoints."""
