"""CIFAR-10 and its stand-ins as batches: fetching, splitting, augmenting."""
