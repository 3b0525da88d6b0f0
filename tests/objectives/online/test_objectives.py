"""GRPO, RLOO and PPO on tiny models: a step's gradients are those of the plain formula over whole sequences."""

from __future__ import annotations

import pytest
import torch

from mmft.objectives.online import formulas as f
from mmft.objectives.online.rollout import Judged
from tests.objectives.online.tries import gradients, samples, step, tried

BETA = 0.05


def judged(values):
    """A judge that gives these rewards, whatever the answers are."""

    def judge(attempts):
        given = torch.tensor(values[: len(attempts)])
        return Judged(given, given, {})

    judge.names = ("given",)
    return judge


REWARDS = [1.0, 0.0, 0.5, 0.0, 0.25, 0.25, 0.25, 0.25, 0.0, 0.0, 0.0, 1.0, 2.0, 1.0, 0.0, 0.0]


def whole_rows(objective, adapted, rollout):
    """Log-probabilities, hidden states and reference by one forward per answer, with neither sharing nor padding."""
    found, states, references = [], [], []
    model, head = adapted.model, objective.policy.head
    for place in range(len(rollout.drawn.tokens)):
        row = rollout.batch.rows[place // rollout.k]
        answer = rollout.drawn.answer(place)
        ids = torch.cat([row.input_ids, answer])[None]
        keep: list[torch.Tensor] = []
        hook = head.register_forward_hook(lambda _, args, out, keep=keep: keep.append(args[0]))
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **row.media, use_cache=False).logits
        hook.remove()
        start = len(row.input_ids) - 1
        found.append(f.token_log_probs(logits[0, start:-1], answer, temperature=objective.section.temperature))
        states.append(keep[0][0, start:-1])
        with torch.no_grad(), model.disable_adapter():
            off = model(input_ids=ids, attention_mask=torch.ones_like(ids), **row.media, use_cache=False).logits
        references.append(f.token_log_probs(off[0, start:-1], answer, temperature=objective.section.temperature))
    return found, states, references


def a_step(tmp_path, name, **objective_fields):
    fields = {f"objective.{key}": value for key, value in objective_fields.items()}
    objective, adapted, renderer = tried(tmp_path, name, **fields)
    objective.judge = judged(REWARDS)
    batch = renderer.assemble([(row, 0) for row in samples()])
    sums = objective.backward(adapted.model, [batch], step(batch))
    ours = gradients(adapted)
    rollout = objective._collect(batch, step(batch))
    return objective, adapted, rollout, sums, ours


def compare(adapted, loss, ours, sums):
    loss.backward()
    theirs = gradients(adapted)
    assert sums["loss"] == pytest.approx(float(loss) * 4, abs=2e-5)
    largest = max(float(value.abs().max()) for value in theirs.values())
    assert largest > 1e-4
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=2e-4 * largest, msg=name)


@pytest.mark.parametrize("variant", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta", [0.0, BETA])
def test_grpo_step(tmp_path, variant, beta):
    objective, adapted, rollout, sums, ours = a_step(tmp_path, "grpo", variant=variant, kl_coef=beta, temperature=1.2)
    logs, _, references = whole_rows(objective, adapted, rollout)
    advantages = f.group_advantages(torch.tensor(REWARDS).reshape(4, 4), scale=variant != "dr_grpo").flatten()
    losses = [
        -(one - one.detach()).exp() * advantage + beta * f.k3(one, reference)
        for one, reference, advantage in zip(logs, references, advantages, strict=True)
    ]
    tokens = sum(len(one) for one in losses)
    loss = {
        "grpo": sum(one.mean() for one in losses) / 16,
        "dapo": sum(one.sum() for one in losses) / tokens,
        "dr_grpo": sum(one.sum() for one in losses) / (16 * 6),
    }[variant]
    compare(adapted, loss, ours, sums)
    assert sums["equal_groups"] == 1 and sums["answers"] == 16 and sums["tokens"] == tokens
    divergence = sum(float(f.k3(one.detach(), other).sum()) for one, other in zip(logs, references, strict=True))
    if beta:
        assert sums["kl"] == pytest.approx(divergence, rel=1e-3)


@pytest.mark.parametrize("beta", [0.0, BETA])
def test_rloo_step(tmp_path, beta):
    objective, adapted, rollout, sums, ours = a_step(tmp_path, "rloo", kl_coef=beta)
    logs, _, references = whole_rows(objective, adapted, rollout)
    rewards = torch.tensor(REWARDS)
    apart = torch.stack([(one.detach() - other).sum() for one, other in zip(logs, references, strict=True)])
    advantages = f.leave_one_out((rewards - beta * apart).reshape(4, 4)).flatten()
    loss = -sum((one.sum() - one.sum().detach()).exp() * a for one, a in zip(logs, advantages, strict=True)) / 16
    compare(adapted, loss, ours, sums)


def test_ppo_step(tmp_path):
    objective, adapted, rollout, sums, ours = a_step(tmp_path, "ppo", kl_coef=BETA, value_coef=0.3, gae_lambda=0.9)
    logs, states, references = whole_rows(objective, adapted, rollout)
    width, lengths = max(map(len, logs)), [len(one) for one in logs]

    def padded(rows):
        return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])

    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    values = padded([objective.policy.value_head(state) for state in states])
    new, reference = padded(logs), padded(references)
    old, before = new.detach(), values.detach()
    rewards = f.token_rewards(torch.tensor(REWARDS), old, reference, mask, kl_coef=BETA)
    advantages = f.gae(rewards, before, mask, gamma=1.0, lam=0.9)
    returns = advantages + before
    inside = advantages[mask]
    advantages = (advantages - inside.mean()) / (inside.var(correction=0) + 1e-8).sqrt()
    policy = (-(new - old).exp() * advantages)[mask].mean()
    value = f.clipped_value(values, before, returns, clip=0.2)[mask].mean()
    compare(adapted, policy + 0.3 * value, ours, sums)
    assert float(ours["value_head.weight"].abs().max()) > 0


def test_groups_of_equal_rewards_pull_on_nothing(tmp_path):
    for name in ("grpo", "rloo"):
        objective, adapted, renderer = tried(tmp_path, name)
        objective.judge = judged([0.3] * 16)
        batch = renderer.assemble([(row, 0) for row in samples()])
        sums = objective.backward(adapted.model, [batch], step(batch))
        assert sums["equal_groups"] == 4 and sums["loss"] == 0.0
        assert all(value.grad is None for value in adapted.trainable().values())


def test_later_updates_use_the_first_probabilities(tmp_path):
    """Two updates on the same answers: the ratio leaves 1, and a small clip stops tokens."""
    for name in ("grpo", "ppo"):
        objective, adapted, renderer = tried(
            tmp_path, name, **{"objective.num_iterations": 2, "objective.clip": [1e-4, 1e-4]}
        )
        objective.judge = judged(REWARDS)
        assert objective.updates == 2
        batch = renderer.assemble([(row, 0) for row in samples()])
        first = objective.backward(adapted.model, [batch], step(batch))
        assert first["clipped"] == 0
        kept = objective._rollouts[0].old.clone()
        with torch.no_grad():
            for value in adapted.trainable().values():
                value.sub_(1e-2 * value.grad.sign())
                value.grad = None
        second = objective.backward(adapted.model, [batch], step(batch, update=1))
        assert second["clipped"] > 0 and second["reward"] == first["reward"]
        assert torch.equal(objective._rollouts[0].old, kept)


def test_cutting_a_step_into_micro_batches_changes_nothing(tmp_path):
    rows = samples()
    for name in ("grpo", "ppo"):
        seen = []
        for cuts in ((0, 4), (0, 1, 4)):
            objective, adapted, renderer = tried(
                tmp_path, name, **{"objective.variant": "dapo"} if name == "grpo" else {}
            )
            micros = [renderer.assemble([(row, 0) for row in rows[a:b]]) for a, b in zip(cuts, cuts[1:], strict=False)]
            context = step(renderer.assemble([(row, 0) for row in rows]))
            sums = objective.backward(adapted.model, micros, context)
            seen.append((sums["reward"], sums["loss"], gradients(adapted)))
        assert seen[0][0] == seen[1][0] and seen[0][1] == pytest.approx(seen[1][1], abs=1e-5)
        for key, value in seen[0][2].items():
            torch.testing.assert_close(seen[1][2][key], value, rtol=1e-3, atol=1e-6)
