"""Sampling: transformers' greedy answers are the oracle; draws depend on seed, step, sample and number alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mmft.backbones.generation import base_model, evaluating
from mmft.objectives.online.policy import Policy
from mmft.objectives.online.sampling import Sampler, inverse, kept, runs_tower_once, uniforms
from mmft.recipe.load import load_recipe
from tests import runs
from tests.objectives.online.tries import changes, samples, step, tiny, tried, with_two_pictures

KINDS = ("llava", "smolvlm", "qwen2_vl", "mllama", "fast_vlm")
SEVERAL = ("llava", "smolvlm", "qwen2_vl")
LONGEST = 7


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    recipe = load_recipe(runs.values(tmp_path_factory.mktemp("online"), changes()))
    adapted, renderer = tiny(recipe, request.param)
    rows = with_two_pictures(samples()) if request.param in SEVERAL else samples()
    batch = renderer.assemble([(row, 0) for row in rows])
    return request.param, adapted, renderer, batch


def sampler(adapted, **how) -> Sampler:
    return Sampler(adapted.model, adapted.backbone.processor, longest=LONGEST, **how)


def numbers(batch, *, k: int, number: int = 0):
    return uniforms(batch.ids, k=k, longest=LONGEST, seed=0, step=number)


def test_greedy_answers_are_those_of_transformers(made):
    _, adapted, _, batch = made
    ours = sampler(adapted)
    found = ours.draw(batch, k=1, step=step(batch))
    with evaluating(adapted.model), torch.no_grad():
        out = adapted.model.generate(**batch.inputs, generation_config=ours.config)
    wanted = out[:, batch.inputs["input_ids"].shape[1] :]
    assert torch.equal(found.tokens[found.mask], wanted[:, : found.tokens.shape[1]][found.mask])


def test_the_trainer_gives_sampled_tokens_the_same_log_probabilities(made):
    """With pictures encoded once for all answers, and with every answer's own."""
    _, adapted, _, batch = made
    ours = sampler(adapted, temperature=1.3)
    found = ours.draw(batch, k=3, step=step(batch), uniform=numbers(batch, k=3))
    model = adapted.model
    policy = Policy(
        model,
        head=base_model(model).get_output_embeddings(),
        pad_token_id=adapted.backbone.pad_token_id,
        temperature=1.3,
    )
    rows = policy.rows(batch, found)
    shared = policy.score(batch, rows, found.mask, step=step(batch)).log_probs
    torch.testing.assert_close(shared.detach(), found.log_probs, rtol=0, atol=2e-5)
    policy.shares = False
    alone = policy.score(batch, rows, found.mask, step=step(batch)).log_probs
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-5)
    assert len({tuple(found.answer(place).tolist()) for place in range(len(found.tokens))}) > len(batch.rows)


def test_gradients_are_the_same_with_pictures_encoded_once(made):
    kind, adapted, _, batch = made
    if not runs_tower_once(adapted.model):
        pytest.skip(f"{kind} takes no encoded pictures")
    ours = sampler(adapted)
    found = ours.draw(batch, k=2, step=step(batch), uniform=numbers(batch, k=2))
    policy = Policy(
        adapted.model,
        head=base_model(adapted.model).get_output_embeddings(),
        pad_token_id=adapted.backbone.pad_token_id,
    )
    rows, seen = policy.rows(batch, found), []
    for shares in (True, False):
        policy.shares = shares
        values = list(adapted.trainable().values())
        total = policy.score(batch, rows, found.mask, step=step(batch)).log_probs.sum()
        seen.append(torch.autograd.grad(total, values, allow_unused=True))
    for one, other in zip(*seen, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_tower_runs_once_for_each_picture(made):
    """Its inputs are as large for five answers to each question as for one."""
    kind, adapted, _, batch = made
    if not runs_tower_once(adapted.model):
        pytest.skip(f"{kind} takes no encoded pictures")
    base, seen = base_model(adapted.model).base_model, []
    tower = getattr(base, "vision_tower", None) or getattr(base, "vision_model", None) or base.visual
    hook = tower.register_forward_pre_hook(
        lambda _, args, named: seen.append(
            [value.shape for value in (*args, *named.values()) if torch.is_tensor(value)]
        ),
        with_kwargs=True,
    )
    try:
        for k in (1, 5):
            sampler(adapted).draw(batch, k=k, step=step(batch), uniform=numbers(batch, k=k))
    finally:
        hook.remove()
    assert len(seen) == 2 and seen[0] == seen[1]


def test_draws_do_not_depend_on_the_batch(made):
    _, adapted, renderer, batch = made
    ours = sampler(adapted, temperature=1.5, top_p=0.9)
    together = ours.draw(batch, k=3, step=step(batch), uniform=numbers(batch, k=3))
    for place, sample in enumerate(batch.samples):
        one = renderer.assemble([(sample, 0)])
        alone = ours.draw(one, k=3, step=step(one), uniform=numbers(one, k=3))
        for which in range(3):
            assert torch.equal(alone.answer(which), together.answer(3 * place + which))


def test_uniforms_are_named_by_seed_step_sample_and_number():
    whole = uniforms(["a", "b"], k=3, longest=4, seed=1, step=5)
    assert whole.shape == (6, 4) and len(set(whole.flatten().tolist())) == 24
    assert torch.equal(whole[3:], uniforms(["b"], k=3, longest=4, seed=1, step=5))
    assert torch.equal(whole[:1, :2], uniforms(["a"], k=1, longest=2, seed=1, step=5))
    for other in (dict(seed=2, step=5), dict(seed=1, step=6)):
        assert not torch.equal(whole, uniforms(["a", "b"], k=3, longest=4, **other))


def test_draws_follow_the_distribution():
    weights = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    many = torch.linspace(0, 1 - 1e-9, 20_000, dtype=torch.float64)
    found = inverse(weights.expand(len(many), 5), many)
    shares = torch.bincount(found, minlength=5) / len(many)
    torch.testing.assert_close(shares, weights, rtol=0, atol=1e-4)
    assert int(inverse(weights[None], torch.tensor([1.0], dtype=torch.float64))) == 3  # never outside of the support


def test_the_nucleus_is_the_smallest_set_that_holds_enough():
    probabilities = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    assert kept(probabilities, 0.6).tolist() == [pytest.approx([0.0, 0.4, 0.3, 0.0])]
    assert kept(probabilities, 0.4).tolist() == [pytest.approx([0.0, 0.4, 0.0, 0.0])]
    assert torch.equal(kept(probabilities, 1.0), probabilities)


def test_a_sampler_that_disagrees_with_the_trainer_stops_the_run(tmp_path):
    from mmft.errors import BackboneError

    objective, adapted, renderer = tried(tmp_path)
    batch = renderer.assemble([(row, 0) for row in samples()])
    draw = objective.sampler.draw

    def off(*given, **named):
        found = draw(*given, **named)
        return dataclasses.replace(found, log_probs=found.log_probs + 0.01 * found.mask)

    objective.sampler.draw = off
    with pytest.raises(BackboneError, match="sampler and trainer disagree.*0.01"):
        objective.backward(adapted.model, [batch], step(batch))
