"""How much arithmetic is counted, and of what."""

import pytest

from cifar_tl import arithmetic
from cifar_tl.arithmetic import flops_per_image, training_flops
from cifar_tl.schedule import STAGES


@pytest.mark.resnet50
def test_the_operations_of_an_image_are_those_of_resnet50():
    forward = 2 * 83.4e6  # multiply-adds, without the classifier
    assert flops_per_image(stages=()) == pytest.approx(forward, rel=0.001)
    assert flops_per_image() == pytest.approx(2.97 * forward, rel=0.001)  # less the images' gradient
    assert flops_per_image(upscale=2) == pytest.approx(4 * flops_per_image(), rel=0.001)


def test_stages_that_do_not_train_have_no_backward_pass():
    counts = [flops_per_image(stages=STAGES[:n]) for n in range(len(STAGES) + 1)]  # layer4 trains first
    assert counts == sorted(counts)
    assert counts[-1] > counts[-2] > counts[1] > counts[0]


@pytest.mark.parametrize(
    ("overrides", "costs"),
    [
        ([], {(1, ()): 2, (1, STAGES): 10}),  # features of the image and of its mirror image, once
        (["finetune.frozen_augment=none"], {(1, ()): 1, (1, STAGES): 10}),
        (["finetune.frozen_augment=full"], {(1, ()): 10, (1, STAGES): 10}),
        (["finetune=full"], {(1, STAGES): 20}),
        (["experiment=best64", "trainer.max_epochs=11"], {(2, ()): 2, (2, STAGES): 1}),
        (["experiment=progressive"], {(2, ()): 2, (2, STAGES[:3]): 4, (4, STAGES[:3]): 6}),
        (["finetune.stages=[layer4]"], {(1, ()): 2, (1, ("layer4",)): 10}),
    ],
)
def test_every_epoch_counts_for_what_it_computes(compose, monkeypatch, overrides, costs):
    counted = {}

    def per_image(upscale, stages):
        counted[upscale, stages] = 1000.0 ** len(counted)
        return counted[upscale, stages]

    monkeypatch.setattr(arithmetic, "flops_per_image", per_image)
    flops = training_flops(compose(*overrides), images=100)
    assert flops == sum(100 * epochs * counted[what] for what, epochs in costs.items())
    assert counted.keys() == costs.keys()
