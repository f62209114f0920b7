"""Which device and precision a run uses, what they are called, and which software drives them."""

import ctypes
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cifar_tl.errors import UserError, check_choice

ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Values of trainer.precision. Those of Lightning in which weights are not float32 round steps away."""
CGROUPS, CGROUP_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux says which control groups a process is in, and what they allow it."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from its malloc.h."""
ALLOCATOR_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "torchmetrics")


def resolve_accelerator(requested: str) -> str:
    """Return `cuda`, `mps` or `cpu` for trainer.accelerator.

    Raises:
        UserError: An unknown name, or a device that is not there.
    """
    check_choice("trainer.accelerator", requested, ACCELERATORS)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    match requested:
        case "auto":
            return "cuda" if cuda else "mps" if mps else "cpu"
        case "cpu":
            return "cpu"
        case "mps" if not mps:
            raise UserError("trainer.accelerator=mps, but there is no Apple GPU here. Use trainer.accelerator=auto.")
        case "gpu" if mps and not cuda:
            return "mps"
        case "gpu" | "cuda" if not cuda:
            built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
            raise UserError(
                f"trainer.accelerator={requested}, but torch sees no CUDA GPU here (torch {torch.__version__} {built}; "
                f"`nvidia-smi` says whether the driver sees one). Use trainer.accelerator=cpu or auto."
            )
    return "mps" if requested == "mps" else "cuda"


def gpu_in_turn(job: int, accelerator: str) -> list[int] | int:
    """Return trainer.devices for a job of a sweep whose jobs share a machine: GPU 0, 1, ..., 0, 1, ... with its number.

    Not by CUDA_VISIBLE_DEVICES: the process may have had another job before, and CUDA reads it once.
    """
    gpus = torch.cuda.device_count() if accelerator == "cuda" else 0
    return [job % gpus] if gpus > 1 else 1


def resolve_precision(requested: str, accelerator: str) -> str:
    """Return Lightning's precision for trainer.precision: `auto` is bf16-mixed where a GPU computes in it.

    On a CPU, Lightning computes in bf16-mixed where 16-mixed is asked for.

    Raises:
        UserError: None of PRECISIONS.
    """
    if check_choice("trainer.precision", requested, PRECISIONS) != "auto":
        return "bf16-mixed" if (requested, accelerator) == ("16-mixed", "cpu") else requested
    return "bf16-mixed" if accelerator == "cuda" and torch.cuda.get_device_capability() >= (8, 0) else "32-true"


def flush_denormals() -> None:
    """Have this CPU take numbers below 1e-38 for zero, which is what they are to a training, and not compute with them.

    The momentum of weights without gradients halves every 7 steps, until a run of some epochs computes with a million
    such numbers, each a hundred times slower than others: 1,059,071 of 23 million, and an eighth of the speed, in the
    18th epoch of best32. To be called before torch computes: threads that it has started do not hear of it.
    """
    torch.set_flush_denormal(True)


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones, instead of giving it back to the system.

    Tensors of more than 32 MB are otherwise mapped anew in every step, and each of their pages filled with zeros before
    it is used: a third of the time of a step of `hires`. It is for the whole process; nothing changes with another C
    library or allocator, or where one of ALLOCATOR_VARIABLES says what its user wants.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


@cache
def cpu_matmul_precision() -> str:
    """Return the name of the precision at which torch multiplies float32 matrices exactly and fastest on this CPU.

    At "highest" torch asks MKL, which does without AVX-512 on AMD's CPUs, at half the speed. At "medium" it asks
    oneDNN, which may round to bfloat16, and does where a CPU has AMX; elsewhere it computes in float32 all the same.
    That it does is seen here from a product.
    """
    if "AuthenticAMD" not in cpuinfo("vendor_id"):
        return "highest"
    left, right = torch.linspace(-1, 1, 2 * 2 * 128 * 256).view(2, 2, 128, 256).unbind()
    exact = left.double() @ right.double().mT
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (left @ right.mT - exact).abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return "medium" if error < 1e-5 * exact.abs().max() else "highest"


def select_gpu(devices: object, accelerator: str) -> None:
    """Make the GPU that trainer.devices names the current one: its name, capability and memory are asked, not GPU 0's.

    Args:
        devices: As Lightning takes them: a number, `auto`, `[1]` or `1,`; of several GPUs, a process has one.
        accelerator: From `resolve_accelerator`. Where it is not `cuda`, GPUs are left alone: they may be full.
    """
    if accelerator != "cuda":
        return
    process = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
    named = [d for d in devices.split(",") if d.strip()] if isinstance(devices, str) and "," in devices else devices
    try:
        index = int(list(named)[process]) if isinstance(named, Sequence) and not isinstance(named, str) else process
    except (IndexError, ValueError):
        return  # Lightning refuses it, and what is not there
    if 0 <= index < torch.cuda.device_count():
        torch.cuda.set_device(index)


def prepare_for(accelerator: str, module: nn.Module) -> None:
    """Choose what makes a model fast on a device and leaves its results the same but for rounding.

    Args:
        accelerator: From `resolve_accelerator`.
        module: Its `backbone` is a `cifar_tl.model.backbone.Backbone`.
    """
    backbone: Any = module.get_submodule("backbone")  # not by its class: the model's layer is above this one
    backbone.tuned_for_cpu = accelerator == "cpu"
    if accelerator == "cpu":
        keep_freed_memory()
    if not torch.cuda.is_available():
        # Lightning makes torch ask the driver's management library, which is not there: opened anew in every step of an
        # optimizer
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
    if accelerator == "cuda":
        module.to(memory_format=torch.channels_last)
    # TF32 on a GPU where the precision is 32-true; another job of this process may have chosen otherwise
    torch.set_float32_matmul_precision("high" if accelerator == "cuda" else cpu_matmul_precision())


@contextmanager
def advice_when_out_of_memory(advice: str) -> Iterator[None]:
    """Say what to do where a GPU's memory is full.

    Args:
        advice: Which keys, with the values that they have.

    Raises:
        UserError: Instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"the GPU ran out of memory. {advice} ({error})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch means that the GPU's memory is full; cuBLAS and cuDNN have their own words."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    signs = (
        *("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DEVICE_ALLOCATION_FAILED"),  # cuDNN 8 and 9
        *("CUDA error: out of memory", "Cuda failure 2 'out of memory'"),  # torch's own, NCCL's
    )
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def device_name(accelerator: str) -> str:
    """Return the GPU's name, or the CPU's with its cores; both where the GPU is part of it, as Apple's."""
    if accelerator == "cuda":
        return torch.cuda.get_device_name()
    models = cpuinfo("model name")
    name = f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
    return f"{name}, Apple GPU" if accelerator == "mps" else name


def cpuinfo(key: str) -> list[str]:
    """Return what Linux says of each core; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(key)]


def host_memory() -> int:
    """Return the bytes that this process may use: the machine's, or less where a control group, a job's, limits it."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with suppress(OSError):
        for line in CGROUPS.read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if "memory" in controllers.split(","):
                mount, name = CGROUP_MOUNT / "memory", "memory.limit_in_bytes"
            elif not controllers:
                mount, name = CGROUP_MOUNT, "memory.max"
            else:
                continue
            place = mount / group.lstrip("/")
            files = [folder / name for folder in (place, *place.parents) if folder.is_relative_to(mount)]
            texts = [file.read_text().strip() for file in files if file.is_file()]
            limits += [int(text) for text in texts if text.isdigit()]  # not `max`
    return min(limits)


def forget_peak_memory(accelerator: str) -> None:
    """Start the peaks of `peak_memory` anew, where the system can: a process may have had another run before."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what `keep_freed_memory` has kept is not this run's
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if accelerator == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory(accelerator: str) -> dict[str, float]:
    """Return the peak memory of this process, in GiB: `host`, and `gpu` if there is a CUDA GPU in use."""
    status = Path("/proc/self/status")
    if status.is_file():
        # not ru_maxrss: on Linux a new process inherits its parent's
        peak = next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    memory = {"host": peak / 2**30}
    if accelerator == "cuda":
        memory["gpu"] = torch.cuda.max_memory_allocated() / 2**30
    return memory


def environment(accelerator: str) -> dict[str, Any]:
    """Return the device and the versions of what computes on it, as plain values."""
    return {
        "device": device_name(accelerator),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
