"""Images that do not fit into memory: decoded anew in every epoch, by worker processes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cifar_tl.data.splits import image_digest
from cifar_tl.errors import UserError


class LazyImages:
    """The images of some files, in memory only while a batch of them is used.

    Args:
        files: One per image.
        decode: Returns the image of a file, (3, height, width), uint8; runs in worker processes.
        workers: Processes that decode, at least 1.
        digests: One per image, see `image_digest`; they are known from when the files were checked.
    """

    def __init__(
        self, files: Sequence[Path], decode: Callable[[Path], np.ndarray], workers: int, digests: Sequence[bytes]
    ) -> None:
        self.files = list(files)
        self.decode = decode
        self.workers = workers
        self.digests = list(digests)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, indices: Tensor) -> "LazyImages":
        """Return a subset, as indexing a tensor of images would."""
        chosen = indices.tolist()
        files, digests = ([values[i] for i in chosen] for values in (self.files, self.digests))
        return LazyImages(files, self.decode, self.workers, digests)

    def read(self, batches: Sequence[Tensor], pin: bool = False) -> Iterator[Tensor]:
        """Yield the images of each batch of indices, (batch, 3, height, width), uint8, in order.

        Args:
            batches: Indices of images.
            pin: Into page-locked memory, from which a GPU copies while it computes; this takes some of the GPU's own.

        Raises:
            UserError: A file cannot be decoded any more, or is another image.
        """
        files = list(zip(self.files, self.digests, strict=True))
        for images in in_workers(self._stack, files, [indices.tolist() for indices in batches], self.workers, pin):
            if isinstance(images, str):
                raise UserError(images)
            yield images

    def _stack(self, files: Sequence[tuple[Path, bytes]]) -> Tensor | str:
        try:
            images = [self.decode(file) for file, _ in files]
            for image, (file, digest) in zip(images, files, strict=True):
                if image_digest(image) != digest:
                    raise UserError(
                        f"{file} is another image than when the run began, which is on record as trained on that one. "
                        f"Put it back, and go on with resume=last, or start a new run."
                    )
            return torch.from_numpy(np.stack(images))
        except UserError as error:  # as a value: an exception would come out of a worker with two tracebacks
            return str(error)


def in_workers(
    task: Callable[[Sequence[Any]], Any],
    files: Sequence[Any],
    batches: Sequence[list[int]],
    workers: int,
    pin: bool = False,
) -> Iterator[Any]:
    """Yield what a task returns for each batch of files, in order; it runs in worker processes.

    Args:
        task: Gets the files of a batch.
        files: All files.
        batches: Indices into `files`.
        workers: Processes, at least 1.
        pin: Put tensors into page-locked memory.
    """
    return iter(
        DataLoader(
            files,  # type: ignore[arg-type]  # a sequence is a dataset, too
            batch_sampler=batches,
            collate_fn=task,
            num_workers=workers,
            pin_memory=pin,
            generator=torch.Generator(),  # a seed for workers, which need none, is not to come from training's draws
        )
    )
