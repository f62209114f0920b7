"""ImageNet weights for the backbone, from torchvision or from a file."""

import hashlib
import warnings
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import ResNet50_Weights

from cifar_tl.errors import UserError, check_number, check_path, first_line, suggest
from cifar_tl.files import check_intact
from cifar_tl.model.backbone import conv_batchnorm_pairs

DEAD_FILTER_SHARE = 1e-3
"""Root mean square of a filter, as a share of the median of its layer's that are not zero, up to which it computes
nothing."""


def load_weights(backbone: nn.Module, weights: str, filter_rms: float | None) -> str:
    """Load ImageNet weights into a backbone.

    Args:
        backbone: A `backbone.Backbone`.
        weights: `IMAGENET1K_V1`, `IMAGENET1K_V2` (downloaded once into torch's cache), or the path of a state dict in
            torchvision's ResNet-50 layout, or of a run's checkpoint, whose backbone it then is.
        filter_rms: Bring every filter to this root mean square (see `rescale_filters`); None keeps the file's scale.

    Returns:
        The SHA-256 of the file that was read.

    Raises:
        UserError: Unknown name, no such file, no network, a file of something else, or no positive `filter_rms`.
    """
    path = check_weights(weights) or _torchvision_file(ResNet50_Weights[weights])
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols, for instance
            state = torch.load(path, map_location="cpu", weights_only=True)
        check_intact(path)
    except Exception as error:  # about anything, for a file that is no state dict
        # torch's own text advises weights_only=False, which runs code from the file, or is a bare number
        raise UserError(
            f"model.weights={weights}: {path} ({path.stat().st_size:,} bytes) is not a readable state dict: it is "
            f"damaged, or it is something else than torch.save(model.state_dict()). What holds more than tensors and "
            f"plain values is not loaded: that could run code."
        ) from error
    if isinstance(state, dict) and "cifar_tl" in state and "state_dict" in state:
        state = _backbone_of_a_run(state, weights)
    _check_layout(backbone, state, weights)
    backbone.load_state_dict({k: v for k, v in state.items() if not k.startswith("fc.")})
    if filter_rms is not None:
        rescale_filters(backbone, filter_rms)
    return file_sha256(path)


def check_weights(weights: str) -> Path | None:
    """Return the path of a file of weights, None for a name of torchvision's; nothing is read or downloaded.

    Raises:
        UserError: Neither.
    """
    if weights in (names := [w.name for w in ResNet50_Weights]):
        return None
    if not (path := check_path("model.weights", weights)).is_file():
        raise UserError(
            f"model.weights={weights}: no such file. "
            f"Give {', '.join(names)}, the path of a ResNet-50 state dict in torchvision's layout or of a run's "
            f"checkpoint (RUN/checkpoints/best.ckpt), or null for random weights.{suggest(weights, names)}"
        )
    return path


@torch.no_grad()
def rescale_filters(backbone: nn.Module, rms: float) -> None:
    """Bring every convolution filter to one root mean square; the BatchNorm layer behind it takes the factor back.

    BatchNorm makes the function independent of a filter's scale, but not its training: a step of a given length is a
    larger share of a smaller filter (van Laarhoven 2017, arXiv:1706.05350). Files of the same network differ in it by
    an order of magnitude. After this a learning rate means the same for all of them. The function in eval mode is
    unchanged up to rounding, BatchNorm's eps included.

    Args:
        backbone: A torchvision ResNet, changed in place.
        rms: Root mean square of each filter, an output channel's slice of a kernel. A dead filter, one below
            DEAD_FILTER_SHARE times its layer's median, stays as it is; its BatchNorm gets the median variance of the
            layer, and the weight that keeps the function. In trained networks the weight of such a channel is all but
            zero, too, and the larger variance keeps the first step that moves the filter from becoming a large signal.
            It does not where the weight is not small, in a file that was pruned by setting filters to zero.

    Raises:
        UserError: `rms` is not positive.
    """
    if not check_number("model.filter_rms", rms, 0) > 0:
        raise UserError(f"model.filter_rms={rms} is not allowed: give a number above 0, or null for the file's scale.")
    for conv, bn in conv_batchnorm_pairs(backbone):
        assert bn.running_mean is not None
        assert bn.running_var is not None
        kernel, variance, mean = conv.weight.double(), bn.running_var.double(), bn.running_mean.double()
        size = kernel.square().mean(dim=(1, 2, 3)).sqrt()
        if not size.any():
            continue  # pruned as a whole
        dead = size <= DEAD_FILTER_SHARE * size[size > 0].median()
        factor = torch.where(dead, 1.0, rms / size)
        rescaled = variance * factor**2
        rescaled = torch.where(dead, rescaled[~dead].median(), rescaled)
        conv.weight.copy_(kernel * factor[:, None, None, None])
        bn.weight.mul_(((rescaled + bn.eps) / (variance + bn.eps)).sqrt() / factor)
        bn.running_mean.copy_(mean * factor)
        bn.running_var.copy_(rescaled)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _torchvision_file(weights: ResNet50_Weights) -> Path:
    path: Path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[-1]
    if not path.is_file():
        try:
            weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(
                f"model.weights={weights.name} cannot be downloaded ({first_line(error)}). "
                f"Put {weights.url} at {path}, "
                f"give model.weights=PATH to a ResNet-50 state dict, or try experiment=demo, which needs no weights."
            ) from error
    return path


def _backbone_of_a_run(checkpoint: dict[str, Any], weights: str) -> dict[str, Tensor]:
    """Return the state dict of the backbone in a checkpoint of this program.

    Raises:
        UserError: It is of a model class with another network.
    """
    if checkpoint["cifar_tl"].get("facts", {}).get("own_network"):
        target = checkpoint["cifar_tl"]["config"]["model"]["_target_"]
        raise UserError(
            f"model.weights={weights} is of {target}, whose layers or forward are not ResNet50Classifier's: if its "
            f"backbone is a ResNet-50 all the same, save its state dict, and give that file."
        )
    prefix = "backbone."
    return {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}


def _check_layout(backbone: nn.Module, state: object, weights: str) -> None:
    """Raise a UserError that says how a state dict differs from a ResNet-50's.

    `num_batches_tracked` may be missing: files from before torch 0.4.1, as that of IMAGENET1K_V1, do not have it, and
    torch fills it in.
    """
    known = backbone.state_dict()
    needed = {k for k in known if not k.endswith("num_batches_tracked")}
    problem = ""
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        keys = f" (its keys: {', '.join(map(str, list(state)[:5]))})" if isinstance(state, dict) else ""
        problem = f"it holds a {type(state).__name__}{keys}, not a dict of tensors"
    elif missing := needed - state.keys():
        problem = f"{len(missing)} of its {len(needed)} tensors are missing, {sorted(missing)[0]} for one"
    elif unknown := {k for k in state if not k.startswith("fc.")} - known.keys():
        problem = f"{len(unknown)} tensors are none of a ResNet-50's, {sorted(unknown)[0]} for one"
    elif wrong := [k for k in known if k in state and known[k].shape != state[k].shape]:
        given, right = tuple(state[wrong[0]].shape), tuple(known[wrong[0]].shape)
        problem = f"{wrong[0]} has shape {given}, a ResNet-50's has {right}"
    elif unusable := [k for k in known if k in state and not state[k].float().isfinite().all()]:
        raise UserError(
            f"model.weights={weights}: {len(unusable)} of its tensors hold NaN or infinite numbers, {unusable[0]} for "
            f"one: nothing can be trained from them. Take the file from its source again."
        )
    if problem:
        raise UserError(
            f"model.weights={weights} is not a ResNet-50 in torchvision's layout: {problem}. "
            f"Give the state_dict() of torchvision.models.resnet50, saved with torch.save."
        )
