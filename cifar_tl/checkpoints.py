"""Writing checkpoints while a run goes on, and reading them back with a readable error."""

import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from cifar_tl.errors import UserError

BEST, LAST = "best.ckpt", "last.ckpt"


def checkpoint_callbacks(folder: Path) -> list[ModelCheckpoint]:
    """Return the callbacks that keep the best epoch's weights and the state to resume from, in this order.

    Args:
        folder: Gets `best.ckpt` (weights only, highest `val/acc`, the first of equals) and `last.ckpt` (all that a
            resumed run needs, after every epoch).
    """
    common: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    best = ModelCheckpoint(
        filename=Path(BEST).stem, monitor="val/acc", mode="max", save_top_k=1, save_weights_only=True, **common
    )
    return [best, ModelCheckpoint(filename=Path(LAST).stem, save_top_k=1, **common)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of this program with weights_only=True, which runs no code from the file.

    Raises:
        UserError: No such file, a truncated one, or somebody else's.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {path}: no such file. A run keeps its checkpoints in RUN/checkpoints/.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read: it is truncated or no checkpoint ({path.stat().st_size:,} bytes; "
            f"{(str(error) or type(error).__name__).splitlines()[0]}). Take the other one in its folder ({BEST}, "
            f"{LAST}), or a copy."
        ) from error
    if not isinstance(checkpoint, dict) or "cifar_tl" not in checkpoint:
        raise UserError(f"checkpoint {path} was not written by cifar_tl.train. Plain weights go into model.weights=.")
    return checkpoint
