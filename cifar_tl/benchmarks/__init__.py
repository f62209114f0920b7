"""Measurements side by side: `python -m cifar_tl.benchmarks`, or `make bench`; nothing else needs them."""
