"""A reward model's folder as a reward: the head on the state of each answer's last token."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmft.backbones.reward_model import write_reward_model
from mmft.data.render import Renderer
from mmft.errors import RecipeError
from mmft.evaluation.model_rewards import by_model
from mmft.evaluation.rewards import find_reward
from mmft.objectives.online.rollout import Attempt
from tests import runs
from tests.objectives.online.tries import samples


@pytest.mark.parametrize("kind", ["llava", "fast_vlm"])
def test_rewards_are_the_head_on_the_last_state(kind, tmp_path):
    base = runs.model(kind)
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    write_reward_model(base, weight, AutoProcessor.from_pretrained(base), tmp_path / "reward")
    attempts = [
        Attempt(row, text, 3, True) for row, text in zip(samples(), ("red", "a", "blue it is", ""), strict=True)
    ]
    found = find_reward(f"reward_model:{tmp_path / 'reward'}", longest=8)(attempts)
    model = AutoModelForImageTextToText.from_pretrained(base).eval()
    renderer = Renderer(AutoProcessor.from_pretrained(base), max_length=512)
    for attempt, value in zip(attempts, found, strict=True):
        row = renderer.prompt(attempt.sample)
        answer = renderer.tokenizer(attempt.text + "<end>", add_special_tokens=False, return_tensors="pt").input_ids[0]
        ids = torch.cat([row.input_ids, answer])[None]
        with torch.no_grad():
            states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), **row.media).last_hidden_state
        assert value == pytest.approx(float(states[0, -1] @ weight[0]), abs=1e-4)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="no model folder"):
        by_model(str(tmp_path))
