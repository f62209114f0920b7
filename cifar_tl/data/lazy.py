"""Images that do not fit into memory: decoded anew in every epoch, by worker processes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class LazyImages:
    """The images of some files, in memory only while a batch of them is used.

    Args:
        files: One per image.
        decode: Returns the image of a file, (3, height, width), uint8; runs in worker processes.
        workers: Processes that decode, at least 1.
    """

    def __init__(self, files: Sequence[Path], decode: Callable[[Path], np.ndarray], workers: int) -> None:
        self.files = list(files)
        self.decode = decode
        self.workers = workers

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> "LazyImages":
        """Return a subset, as indexing a tensor of images would."""
        return LazyImages([self.files[i] for i in indices.tolist()], self.decode, self.workers)

    def read(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, (batch, 3, height, width), uint8, in order."""
        return iter(
            DataLoader(
                _Batches(self.files, self.decode),
                sampler=[indices.tolist() for indices in batches],
                batch_size=None,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            )
        )


class _Batches(Dataset[Tensor]):
    """Decodes the files of a list of indices; a loader's worker has nothing else to do."""

    def __init__(self, files: list[Path], decode: Callable[[Path], np.ndarray]) -> None:
        self.files = files
        self.decode = decode

    def __getitem__(self, indices: list[int]) -> Tensor:
        return torch.from_numpy(np.stack([self.decode(self.files[i]) for i in indices]))
