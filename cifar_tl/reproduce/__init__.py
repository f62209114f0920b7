"""The published tables, from nothing but the data and the weights: `python -m cifar_tl.reproduce`."""
