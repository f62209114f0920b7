"""A run's folder: what is written there, in which format, and how it is read back. Nothing here imports torch."""
