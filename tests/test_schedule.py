import shutil

import pytest

from cifar_tl import cli
from cifar_tl.build import config_warnings, keys_without_effect
from cifar_tl.errors import UserError
from cifar_tl.schedule import STAGES, FinetuneSchedule

TWO_PHASE = {
    "max_epochs": 20,
    "unfreeze_at_epoch": 10,
    "stage_epochs": 0,
    "head_lr": 1e-3,
    "backbone_lr": 1e-4,
    "head_lr_unfrozen": 2e-4,
    "schedule": "constant",
    "warmup_epochs": 0.0,
}


def plan(**changes):
    return FinetuneSchedule(**{**TWO_PHASE, **changes})


def test_two_phases_meet_at_the_unfreeze():
    two = plan()
    assert [(p.start, p.end, p.stages) for p in two.phases] == [(0, 10, ()), (10, 20, STAGES)]
    assert two.phase(9).stages == ()
    assert two.phase(10).stages == STAGES


def test_learning_rates_drop_at_the_unfreeze():
    assert plan().learning_rates(9, 99, 100) == {"head": 1e-3, "backbone": 0.0}
    assert plan().learning_rates(10, 0, 100) == {"head": 2e-4, "backbone": 1e-4}


def test_a_linear_probe_is_one_linear_layer_on_a_frozen_backbone(compose):
    cfg = compose("finetune=linear_probe")
    assert (cfg.model.head, cfg.finetune.unfreeze_at_epoch) == ([], None)
    assert compose("finetune=head_only").model.head == [128, 64]


def test_without_an_unfreeze_only_the_head_trains_and_from_epoch_0_on_everything():
    assert [p.stages for p in plan(unfreeze_at_epoch=None).phases] == [()]
    assert [p.stages for p in plan(unfreeze_at_epoch=0).phases] == [STAGES]


RECIPES = sorted(path.stem for path in (cli.conf_folder() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("choice", ["head_only", "linear_probe", "full", "gradual"])
def test_no_recipe_takes_back_what_is_chosen_to_train_when(compose, choice):
    keys = ("unfreeze_at_epoch", "stage_epochs")
    alone = compose(f"finetune={choice}").finetune
    for recipe in RECIPES:
        together = compose(f"experiment={recipe}", f"finetune={choice}").finetune
        assert [together[key] for key in keys] == [alone[key] for key in keys], recipe


def test_gradual_thaws_from_the_top_and_ends_with_everything():
    phases = plan(stage_epochs=2).phases
    assert [p.start for p in phases] == [0, 10, 12, 14, 16, 18]
    assert [p.stages for p in phases[1:]] == [STAGES[:n] for n in range(1, 6)]
    assert phases[-1].end == 20


def test_the_stages_that_are_named_unfreeze_and_no_others():
    assert plan(stages=["layer3", "layer4"]).phases[1].stages == ("layer4", "layer3")
    assert [p.stages for p in plan(stages=["layer1", "layer4"], stage_epochs=5).phases] == [
        (),
        ("layer4",),
        ("layer4", "layer1"),
    ]
    growing = plan(stages=["layer4"], progressive_resizing=[1, 2]).phases[1:]
    assert [(p.stages, p.upscale) for p in growing] == [(("layer4",), 1), (("layer4",), 2)]


def test_images_grow_in_equal_parts_of_finetuning():
    phases = plan(progressive_resizing=[2, 3, 4]).phases
    assert [(p.start, p.end, p.upscale) for p in phases] == [(0, 10, None), (10, 14, 2), (14, 17, 3), (17, 20, 4)]
    assert [p.name for p in phases[1:]] == [f"fine-tune at {side}x{side}" for side in (64, 96, 128)]
    assert all(p.stages == STAGES for p in phases[1:])
    assert [p.upscale for p in plan(unfreeze_at_epoch=0, progressive_resizing=[1, 4]).phases] == [1, 4]


def test_a_size_that_is_given_more_than_once_is_one_longer_phase():
    phases = plan(progressive_resizing=[2, 4, 4, 4]).phases
    assert [(p.start, p.end, p.upscale) for p in phases] == [(0, 10, None), (10, 13, 2), (13, 20, 4)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"progressive_resizing": [3, 2]}, r"progressive_resizing=\[3,2\]: no factor can be smaller"),
        ({"progressive_resizing": [0, 2]}, "each factor of finetune.progressive_resizing=0 is not allowed"),
        ({"progressive_resizing": [2, 3], "stage_epochs": 1}, "not possible together"),
        ({"progressive_resizing": [2, 3], "unfreeze_at_epoch": 19}, "needs an epoch of fine-tuning for each factor"),
        ({"progressive_resizing": 3}, "progressive_resizing=3 is not allowed: give a list of factors"),
    ],
)
def test_images_that_cannot_grow_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        plan(**changes)


def test_cosine_runs_from_the_peak_to_zero_within_each_segment():
    cosine = plan(schedule="cosine")
    assert cosine.learning_rates(0, 0, 100)["head"] == 1e-3
    assert cosine.learning_rates(5, 0, 100)["head"] == pytest.approx(0.5e-3)
    assert cosine.learning_rates(9, 99, 100)["head"] < 1e-6
    assert cosine.learning_rates(10, 0, 100)["backbone"] == 1e-4
    assert cosine.learning_rates(19, 99, 100)["backbone"] < 1e-7


@pytest.mark.parametrize("split", [{"progressive_resizing": [2, 3, 4]}, {"stage_epochs": 2}])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_rates_that_a_phase_is_announced_with_are_its_highest(schedule, split):
    several = plan(schedule=schedule, **split)
    for phase in several.phases:
        steps = [
            several.learning_rates(epoch, batch, 100) for epoch in range(phase.start, phase.end) for batch in range(100)
        ]
        peak = several.peak_learning_rates(phase)
        assert peak == {name: max(step[name] for step in steps) for name in ("head", "backbone")}
    assert plan(schedule=schedule, warmup_epochs=1.0, **split).peak_learning_rates(several.phases[-1]) == peak


def test_warmup_rises_linearly_and_never_starts_at_zero():
    warm = plan(warmup_epochs=2.0)
    assert warm.learning_rates(10, 0, 100)["backbone"] == pytest.approx(1e-4 / 200)
    assert warm.learning_rates(11, 0, 100)["backbone"] == pytest.approx(1e-4 * 101 / 200)
    assert warm.learning_rates(12, 0, 100)["backbone"] == 1e-4


@pytest.mark.parametrize(
    ("given", "without"),
    [
        (["finetune=full", "finetune.head_lr=1e-5"], ["finetune.head_lr=1e-5"]),
        (["finetune=full", "finetune.head_lr_unfrozen=1e-5"], []),
        (["finetune=full", "finetune.head_lr=1e-5", "finetune.head_lr_unfrozen=null"], []),
        (["finetune=linear_probe", "finetune.backbone_lr=1", "finetune.batchnorm=train"], [1, 2]),
        (["finetune=linear_probe", "finetune.momentum=0.5"], [1]),
        (["finetune=linear_probe", "finetune.momentum=0.5", "finetune.optimizer=sgd"], []),
        (["finetune=full", "finetune.progressive_resizing=[2,3]", "model.upscale=4"], [2]),
        (["finetune.progressive_resizing=[2,3]", "model.upscale=4"], []),
        (["finetune.optimizer=adamw", "finetune.momentum=0.95"], [1]),
        (["finetune.momentum=0.95"], []),
        (["model.weights=null", "model.filter_rms=0.1"], [1]),
        (["model.weights=null", "finetune.distill_weight=1", "finetune.distill_upscale=2"], [1, 2]),
        (["finetune.distill_weight=1", "finetune.distill_upscale=2"], []),
        (["finetune=linear_probe", "finetune.distill_upscale=2", "finetune.distill_weight=1"], [2, 1]),
        (["finetune.distill_weight=1"], [0]),
        (["experiment=distill32", "finetune.distill_weight=1"], []),
        (["experiment=distill32", "finetune.distill_upscale=null"], []),
        (["model.head=[]", "model.dropout=0.5"], [1]),
        (["model.dropout=0.5"], []),
        (["+trainer.gradient_clip_algorithm=norm"], [0]),
        (["+trainer.gradient_clip_algorithm=norm", "+trainer.gradient_clip_val=1"], []),
        (["experiment=seed_baseline"], []),
        (["experiment=seed_baseline", "ablate=bn_train"], [1]),
        (["experiment=hires", "ablate=lower_rate"], [1]),
        (["ablate=lower_rate", "experiment=best32"], []),
        (["ablate=none"], []),
    ],
)
def test_keys_that_change_nothing_are_named(compose, given, without):
    expected = [given[key] if isinstance(key, int) else key for key in without]
    said = keys_without_effect(compose(*given), given)
    assert [sentence.partition(" has no effect: ")[0] for sentence in said] == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], False),
        (["model.weights=null"], True),
        (["model.weights=null", "finetune.batchnorm=train"], False),
        (["model.weights=null", "finetune=linear_probe"], False),
    ],
)
def test_statistics_of_random_weights_are_doubted(compose, given, said):
    assert [sentence.partition(":")[0] for sentence in config_warnings(compose(*given))] == [
        "model.weights=null with finetune.batchnorm=frozen"
    ] * said


def test_an_ablation_that_other_keys_need_has_an_effect(compose, tmp_path, monkeypatch):
    conf = shutil.copytree(cli.conf_folder(), tmp_path / "conf")
    text = "# @package _global_\ndefaults:\n  - override /callbacks: early_stopping\n"
    (conf / "ablate" / "patience.yaml").write_text(text)
    monkeypatch.setattr(cli, "conf_folder", lambda: conf)
    given = ["ablate=patience", "callbacks.early_stopping.patience=2"]
    assert keys_without_effect(compose(*given), given) == []


def test_a_size_of_validation_beside_a_validation_split_is_named(compose):
    given = ["data.val_size=7"]
    assert keys_without_effect(compose(*given), given) == []
    (said,) = keys_without_effect(compose(*given), given, own_val=True)
    assert said == "data.val_size=7 has no effect: the data has a validation split of its own."


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"unfreeze_at_epoch": 20}, "never reached"),
        ({"unfreeze_at_epoch": -1}, "unfreeze_at_epoch"),
        ({"stage_epochs": 3}, "stage_epochs=3 is too long"),
        ({"stages": ["layer4"], "stage_epochs": 0, "unfreeze_at_epoch": 20}, "never reached"),
        ({"stages": ["layer3", "layer4"], "stage_epochs": 10}, "the last stage, layer3, would unfreeze at epoch 20"),
        ({"stages": ["layer5"]}, r"a stage in finetune.stages=layer5 is not allowed: choose layer4, .*stem"),
        ({"stages": 4}, "finetune.stages=4 is not allowed: give a list"),
        ({"stages": "layer4"}, r"finetune.stages=layer4 is not allowed: .*\[layer3,layer4\]"),
        ({"stages": []}, r"finetune.stages=\[\] unfreezes nothing"),
        ({"unfreeze_at_epoch": None, "stages": ["layer4"]}, r"finetune.stages=\[layer4\] would have no effect"),
        ({"unfreeze_at_epoch": None, "stages": "layer4"}, "finetune.stages=layer4 would have no effect"),
        ({"unfreeze_at_epoch": None, "stage_epochs": 1}, "finetune.stage_epochs=1 would have no effect"),
        ({"unfreeze_at_epoch": None, "progressive_resizing": [1, 2]}, r"progressive_resizing=\[1,2\] would have no"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"head_lr": -1.0}, "head_lr"),
        ({"backbone_lr": "fast"}, "backbone_lr"),
        ({"schedule": "cosin"}, "Did you mean cosine"),
        ({"warmup_epochs": float("nan")}, "warmup_epochs"),
    ],
)
def test_impossible_plans_are_refused(changes, key):
    with pytest.raises(UserError, match=key):
        plan(**changes)


def test_the_unfrozen_heads_rate_is_the_frozen_ones_unless_given():
    assert plan(head_lr_unfrozen=None).learning_rates(10, 0, 100)["head"] == plan().learning_rates(0, 0, 100)["head"]
    assert plan(head_lr_unfrozen=0).learning_rates(10, 0, 100)["head"] == 0


@pytest.mark.parametrize("max_epochs", [12, 18])
def test_a_stage_that_would_unfreeze_after_the_last_epoch_is_refused_with_the_epochs_that_all_need(max_epochs):
    with pytest.raises(UserError, match=r"stem, would unfreeze at epoch 18, .*raise trainer.max_epochs to 19 or more"):
        FinetuneSchedule(max_epochs, 10, 1e-3, 1e-3, stage_epochs=2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"warmup_epochs": 11}, "warmup_epochs=11 is too long for 10 frozen epochs"),
        ({"warmup_epochs": 5, "unfreeze_at_epoch": 16}, "warmup_epochs=5 is too long for 4 epochs of fine-tuning"),
        ({"warmup_epochs": 5, "unfreeze_at_epoch": 4}, "warmup_epochs=5 is too long for 4 frozen epochs"),
        ({"warmup_epochs": 21, "unfreeze_at_epoch": 0}, "warmup_epochs=21 is too long for 20 epochs of fine-tuning"),
    ],
)
def test_a_warmup_whose_rate_is_never_reached_is_refused_of_a_run_that_starts(changes, said):
    schedule = plan(**changes)  # of an older run, say, which can still be measured
    with pytest.raises(UserError, match=said):
        schedule.check_warmup()


def test_warmup_may_take_a_whole_segment():
    for changes in ({"warmup_epochs": 10}, {"warmup_epochs": 20, "unfreeze_at_epoch": 0}):
        plan(**changes).check_warmup()
    assert plan(warmup_epochs=10).learning_rates(9, 99, 100)["head"] == 1e-3
    assert plan(warmup_epochs=20, unfreeze_at_epoch=0).learning_rates(19, 99, 100)["backbone"] == 1e-4
