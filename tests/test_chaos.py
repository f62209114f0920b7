"""A few kills at random moments; `make chaos` makes 50."""

import chaos
import pytest


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_killed_runs_go_on_and_end_as_undisturbed_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "RUN", (*chaos.RUN, "trainer.max_epochs=4", "finetune.unfreeze_at_epoch=2"))
    # with this seed, unless a run ends before it is killed, the second kill comes while a checkpoint is being written
    assert sum(chaos.chaos(kills=2, seed=4, folder=tmp_path).values()) == 2
