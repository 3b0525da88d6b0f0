"""An objective of one's own: focal cross-entropy of the answers' tokens (Lin et al. 2017, arXiv 1708.02002).

    mmft train RECIPE --objective recipes/example_objective.py:FocalObjective

A token that is already likely counts less: `-(1 - p)^gamma log p`, here with gamma = 2.
"""

import torch

from mmft.objectives.base import Loss


class FocalObjective:
    name = "focal"
    # What is shown of every step beside the loss: NAME = sum of a log over another one, or over the step's count.
    metrics = {"token_accuracy": ("correct", "count"), "mean_weight": ("weight", "count")}
    gamma = 2.0

    def __init__(self, model, recipe):
        """Called once, with the model that has its adapters and the checked recipe."""

    def count(self, batch):
        """What the loss is a sum over: the engine divides once, by the count of the whole optimizer step."""
        return batch.supervised

    def loss(self, model, batch):
        """One forward: the sum with its graph, its count, and sums to be logged."""
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
        targets = batch.labels[:, 1:]  # the state at t says the token at t + 1
        there = targets != -100  # a label without loss
        scores, wanted = logits[there].float(), targets[there]
        log_p = scores.log_softmax(-1).gather(1, wanted[:, None])[:, 0]
        weight = (1 - log_p.exp()) ** self.gamma
        correct = (scores.argmax(-1) == wanted).sum()
        return Loss(
            sum=-torch.sum(weight * log_p),
            count=batch.supervised,
            logs={"correct": correct, "weight": weight.detach().sum()},
        )
