"""The loop that trains both shipped models: its learning rate, and going on after an interruption."""

from __future__ import annotations

import numpy as np
import pytest
import torch


def test_learning_rate_rises_holds_and_falls_to_zero(recipe):
    factor = recipe("loop").learning_rate_factor
    train = {"decay_fraction": 0.3, "warmup_steps": 10}
    rates = [factor(step, 100, train) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10:71] == pytest.approx(np.ones(61))
    assert rates[70:] == pytest.approx(np.arange(30, 0, -1) / 30)


def test_an_interrupted_run_ends_like_one_that_was_not(recipe, tmp_path):
    loop = recipe("loop")
    train = {
        "learning_rate": 0.1, "betas": [0.9, 0.95], "weight_decay": 0.1, "clip": 1.0, "decay_fraction": 0.5,
        "warmup_steps": 2,
    }  # fmt: skip

    def trained(folder, stop):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 1)

        def gradients(step, decaying):
            if step == stop:
                raise KeyboardInterrupt
            assert decaying == (step >= 4)
            loss = (model(torch.full((1, 3), step + 1.0)) - 1).square().sum()
            loss.backward()
            return {"loss": loss.item(), "seen": 10 + step}

        loop.run(model, folder, 8, train, gradients, counted=("seen",), step_tokens=1, log_steps=3)
        return model.weight, torch.load(folder / "last.pt", weights_only=True)

    whole, state = trained(tmp_path / "whole", stop=-1)
    assert (state["step"], state["seen"]) == (8, sum(range(10, 18)))
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=6)
    (tmp_path / "parts" / "stable.pt").rename(tmp_path / "parts" / "last.pt")  # what was written before the rate fell
    resumed, state = trained(tmp_path / "parts", stop=-1)
    assert torch.equal(resumed, whole)
    assert (state["step"], state["seen"]) == (8, sum(range(10, 18)))
