"""What recipes of X-VLM may say, one module per task. Nothing here imports torch."""
