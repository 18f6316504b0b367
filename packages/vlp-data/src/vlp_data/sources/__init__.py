"""Readers. Options of a source and its `open()` are in `vlp_data.options`; the line files can also be
streamed by shard."""
