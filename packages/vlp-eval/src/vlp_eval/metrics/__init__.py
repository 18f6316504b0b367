"""Metrics as functions of arrays and ids: nothing here knows a model, a file or a device."""
