"""Measurements, one command each; nothing here is needed to train, predict or export."""
