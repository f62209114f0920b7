"""What a run leaves behind, read back from its files; nothing here imports torch."""
