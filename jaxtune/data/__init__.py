"""Rows to batches, in numpy: nothing here imports jax, and readers are imported when used."""
