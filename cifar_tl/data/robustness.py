"""Other test sets for CIFAR-10: CIFAR-10.1 (new images, Recht et al. 2018), CIFAR-10-C (corrupted, Hendrycks 2019).

Nothing is downloaded. The files belong under data.root as their authors name them:

    <root>/cifar10.1_v6_data.npy, cifar10.1_v6_labels.npy    github.com/modestyachts/CIFAR-10.1, folder datasets (or v4)
    <root>/CIFAR-10-C/fog.npy, ..., labels.npy               zenodo.org/records/2535967, CIFAR-10-C.tar, unpacked
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_tl.errors import UserError, check_choice

VERSIONS = ("v4", "v6")
"""Of CIFAR-10.1: 2,021 images, and 2,000 with the classes balanced, which its authors recommend."""

SEVERITIES = 5
CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The fifteen of the benchmark, whose mean is reported."""
EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""In the archive, too, for tuning; not in the mean."""

FOLDER = "CIFAR-10-C"
SOURCE = {
    "cifar10_1": "github.com/modestyachts/CIFAR-10.1 has it in its folder `datasets`",
    "cifar10_c": (
        "zenodo.org/records/2535967 has CIFAR-10-C.tar (2.9 GB, MD5 56bf5dcef84df0e2308c6dcbcbbd8499); unpack it there"
    ),
}


def cifar10_1(root: Path, version: str) -> tuple[Tensor, Tensor]:
    """Load CIFAR-10.1.

    Returns:
        Images, (examples, 3, 32, 32), uint8, and targets, (examples,), int64, CIFAR-10's indices.

    Raises:
        UserError: Unknown version, a file is missing, or is not what its name says.
    """
    check_choice("cifar10_1", version, VERSIONS)
    key = "cifar10_1"
    images = _images(key, path := root / f"cifar10.1_{version}_data.npy")
    if len(images) == 0:
        raise UserError(f"{key}: {path} has no images. {_advice(key)}")
    return as_tensor(images), _targets(key, root / f"cifar10.1_{version}_labels.npy", len(images))


def chosen_corruptions(choice: str | Sequence[str]) -> list[str]:
    """Return the corruptions that `cifar10_c` asks for: `all` is the benchmark's fifteen.

    Raises:
        UserError: An unknown name.
    """
    if choice == "all":
        return list(CORRUPTIONS)
    if isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
        return [check_choice("cifar10_c", choice, ("all", *CORRUPTIONS, *EXTRA_CORRUPTIONS))]
    names = [check_choice("a name in cifar10_c", name, (*CORRUPTIONS, *EXTRA_CORRUPTIONS)) for name in choice]
    return list(dict.fromkeys(names))


def cifar10_c(root: Path, corruption: str) -> tuple[NDArray[np.generic], Tensor]:
    """Open one corruption of CIFAR-10-C; its images are read when they are used.

    Returns:
        Images, (5, examples, 32, 32, 3), uint8, by severity, and the targets of each, (examples,), int64.

    Raises:
        UserError: A file is missing, or is not what its name says.
    """
    key = "cifar10_c"
    path = root / FOLDER / f"{corruption}.npy"
    images = _images(key, path)
    if len(images) == 0 or len(images) % SEVERITIES:
        raise UserError(f"{key}: {path} has {len(images)} images, which is no multiple of {SEVERITIES} severities.")
    targets = _targets(key, root / FOLDER / "labels.npy", len(images)).view(SEVERITIES, -1)
    if not bool((targets == targets[0]).all()):
        raise UserError(f"{key}: {root / FOLDER / 'labels.npy'} is not the same for every severity. {_advice(key)}")
    return images.reshape(SEVERITIES, -1, *images.shape[1:]), targets[0]


def _load(key: str, path: Path) -> NDArray[np.generic]:
    if not path.is_file():
        raise UserError(f"{key}: {path} is missing. {_advice(key)}")
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError("it is an archive")
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{key}: {path} is not a readable .npy file ({error}). {_advice(key)}") from error
    return array


def _images(key: str, path: Path) -> NDArray[np.generic]:
    images = _load(key, path)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (32, 32, 3):
        raise UserError(
            f"{key}: {path} holds {images.dtype} of shape {images.shape}, not uint8 (examples, 32, 32, 3). "
            f"{_advice(key)}"
        )
    return images


def _targets(key: str, path: Path, examples: int) -> Tensor:
    labels = _load(key, path)
    if labels.shape != (examples,) or labels.dtype.kind not in "iu" or not np.isin(labels, np.arange(10)).all():
        raise UserError(f"{key}: {path} does not hold {examples} class indices, 0 to 9. {_advice(key)}")
    return torch.from_numpy(labels.astype(np.int64))


def as_tensor(images: NDArray[np.generic]) -> Tensor:
    """Return images (examples, 32, 32, 3) as (examples, 3, 32, 32)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _advice(key: str) -> str:
    return f"{SOURCE[key]}."
