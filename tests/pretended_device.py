"""No tensor of a batch, a step or an evaluation stays behind on the CPU, and no batch makes the host wait for a GPU.

Shown without a GPU: a device written in Python says where a tensor is, and computes on the CPU.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cifar_tl.build import build_augment, build_module, build_unfreeze
from cifar_tl.data.loader import ArrayLoader
from cifar_tl.model.distillation import ridge_regression, standardize
from cifar_tl.model.optim import match_parameters

register = backend_registration._setup_privateuseone_for_python_backend

aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)
CPU_INDICES_ALLOWED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
WAITS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.bincount.default)
"""What gives the host a value, or a shape, that only the device knows."""


class There(torch.Tensor):
    """A tensor that says it is on the device; its values are in `values`, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values):
        place = torch.device("pretend", 0)
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), dtype=values.dtype, device=place
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


waits: Counter[str] = Counter()


def dispatch(function, args, kwargs):
    """Compute on the CPU, refuse tensors of two devices, and count what makes the host wait."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = {id(t.values): t for t in tensors if isinstance(t, There)}
    asked = kwargs.get("device")
    result_there = bool(there) if asked is None else torch.device(asked).type == "pretend"
    if function in COPIES:
        if function is aten.copy_.default:
            result_there = isinstance(args[0], There)
        crosses = (len(there) == 1 and (len(tensors) == 2 or not result_there)) or (result_there and not there)
        if crosses and not kwargs.get("non_blocking", False):
            waits["copy"] += 1
    elif there and function not in CPU_INDICES_ALLOWED:
        left = [tuple(t.shape) for t in tensors if t.ndim and not isinstance(t, There)]
        assert not left, f"{function} has CPU tensors {left} beside the device's"
    if result_there and function in WAITS:
        waits[str(function)] += 1
    if result_there or asked is not None:
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "non_blocking")}
    args, kwargs = tree_map_only(There, lambda t: t.values, (args, kwargs))
    result = function(*args, **kwargs, **({"device": "cpu"} if asked is not None else {}))

    def placed(tensor):
        return there[id(tensor)] if id(tensor) in there else There(tensor) if result_there else tensor

    return tree_map_only(torch.Tensor, placed, result)


@pytest.fixture(scope="module")
def place():
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "_is_in_bad_fork": False}
    answers |= {"manual_seed_all": None, "is_initialized": True}
    register("pretend", SimpleNamespace(**{name: lambda *_, answer=answer: answer for name, answer in answers.items()}))
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes to the dispatch, too
    yield torch.device("pretend", 0)
    torch._C._set_only_lift_cpu_tensors(False)


def on(place, compose, *overrides):
    """A classifier on the device, all of it training, and a batch."""
    cfg = compose("experiment=demo", "finetune=full", "finetune.weight_decay=0", "trainer=cpu", *overrides)
    module = build_module(cfg, [str(n) for n in range(10)])
    module.to(memory_format=torch.channels_last).to(place)
    unfreeze = build_unfreeze(cfg)
    unfreeze.apply(module, unfreeze.schedule.phases[-1])
    return module, torch.randn(4, 3, 32, 32).to(place), torch.tensor([1, 2, 3, 4]).to(place)


@pytest.mark.parametrize("augment", ["none", "flip_crop", "rotate_flip", "strong"])
def test_batches_are_made_on_the_device_without_waiting(place, compose, augment):
    build = build_augment(compose(f"augment={augment}", "finetune=full"))
    images, targets = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8), torch.arange(12) % 10
    with Device():
        teacher = torch.zeros(2, 12, 5).to(place)
        options = {"augment": build, "teacher": lambda: teacher, "device": place}
        batches = iter(ArrayLoader(images, targets, 4, [0.5] * 3, [0.2] * 3, **options))
        next(batches)  # an epoch's order and draws are copied once
        waits.clear()
        assert [[tensor.device for tensor in batch] for batch in batches] == [[place, place, place]] * 2
    assert not waits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam", "sgd"])
def test_a_step_stays_on_the_device_without_waiting(place, compose, optimizer, dtype):
    with Device():
        module, images, targets = on(place, compose, f"finetune.optimizer={optimizer}")
        steps = module.configure_optimizers()
        waits.clear()
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):  # the values are the CPU's
            loss = cross_entropy(module(images), targets)
        loss.backward()
        steps.step()
    assert not waits
    assert all(p.device == p.grad.device == place for p in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_is_imitated_on_the_device_without_waiting(place, compose, dtype):
    features, teacher = torch.randn(40, 2048), torch.randn(40, 2048)
    with Device():
        module, images, _ = on(place, compose)
        there = teacher.to(place, dtype)
        standardize(there)
        module.map_to_teacher = ridge_regression(features.to(place, dtype), there)
        assert module.map_to_teacher.device == place
        waits.clear()
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):  # the values are the CPU's
            loss = module.distillation_loss(module.backbone(images), there[: len(images)])
        loss.backward()
    assert not waits
    assert loss.device == place


@pytest.mark.parametrize("optimizer", ["muon", "adamw", "adam", "sgd"])
def test_an_optimizer_whose_state_was_read_on_the_cpu_goes_on_on_the_device(place, compose, optimizer):
    def step():
        with Device():
            cross_entropy(module(images), targets).backward()
            steps.step()

    with Device():
        module, images, targets = on(place, compose, f"finetune.optimizer={optimizer}")
        steps = module.configure_optimizers()
    step()
    with Device():
        saved = tree_map_only(torch.Tensor, torch.Tensor.cpu, steps.state_dict())
        steps = module.configure_optimizers()
        steps.load_state_dict(saved)
        match_parameters(steps)
    step()
    states = [value for state in steps.state.values() for value in state.values()]
    assert {value.device for value in states if isinstance(value, torch.Tensor)} <= {place}


def test_an_evaluation_stays_on_the_device(place, compose):
    with Device():
        module, images, targets = on(place, compose)
        module.eval()
        module.log = lambda *args, **options: None
        waits.clear()
        with torch.no_grad():
            logits = module.validation_step((images, targets), 0)
    assert logits.device == place
    assert not +Counter({name: n for name, n in waits.items() if "bincount" not in name})  # of torchmetrics


def test_two_devices_in_one_operation_are_noticed(place):
    with Device(), pytest.raises(AssertionError, match="beside the device's"):
        torch.ones(2, device=place) + torch.ones(2)
