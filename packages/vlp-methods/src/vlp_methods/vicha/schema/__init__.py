"""What recipes of ViCHA may say, one module per task. Nothing here imports torch."""
