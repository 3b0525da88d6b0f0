"""The captioning loss against the models' own, against a formula in float64, and what may not happen to it."""

from __future__ import annotations

import copy

import pytest
import torch

from mmft.backbones.roots import head_of
from mmft.data.render import IGNORED
from mmft.objectives.captioning import CaptioningObjective
from tests.objectives.captioners import PICTURES, SOUNDS, renderer_of, samples, tiny_captioner

CLOSE = 1e-5
KINDS = (*PICTURES, "blip-2", *SOUNDS)


def _rows(renderer, count=4):
    return samples(count, sound=renderer.image_processor is None)


def _batch(model, processor, *, prompt="", count=4, **options):
    renderer = renderer_of(model, processor, prompt=prompt, **options)
    return renderer, renderer.assemble([(sample, 0) for sample in _rows(renderer, count)])


def _own_loss(model, batch, renderer):
    """The model's own loss times the tokens it is the mean of; a decoder shifts the labels by itself."""
    inputs = dict(batch.inputs)
    with torch.no_grad():
        return _mean_of(model, inputs, batch, renderer) * batch.supervised


def _mean_of(model, inputs, batch, renderer):
    if renderer.shape.encoder_decoder:
        inputs.pop("decoder_input_ids")
        return float(model(**inputs, labels=batch.labels).loss)
    text = inputs["input_ids"]
    # Its last label has no token before it in `input_ids`: the rows are made one longer.
    longer = torch.cat((text, torch.zeros_like(text[:, :1])), 1)
    labels = torch.cat((torch.full_like(text[:, :1], IGNORED), batch.labels), 1)
    mask = inputs["attention_mask"]
    inputs |= {"input_ids": longer, "attention_mask": torch.cat((mask, torch.ones_like(mask[:, :1])), 1)}
    return float(model(**inputs, labels=labels).loss)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", ["", "it is"], ids=["plain", "prompt"])
def test_the_loss_is_the_models_own(kind, prompt):
    model, processor = tiny_captioner(kind)
    renderer, batch = _batch(model, processor, prompt=prompt)
    objective = CaptioningObjective(head=head_of(model), shape=renderer.shape)
    found = objective.loss(model, batch)
    assert found.count == objective.count(batch) == int((batch.labels != IGNORED).sum())
    if renderer.shape.encoder_decoder and prompt and renderer.shape.prompt == "decoder":
        return  # the model's own shift would put the label -100 where the prompt stands
    assert found.sum.item() == pytest.approx(_own_loss(model, batch, renderer), rel=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula_in_float64(kind, smoothing):
    model, processor = tiny_captioner(kind)
    renderer, batch = _batch(model, processor)
    found = CaptioningObjective(head=head_of(model), shape=renderer.shape, label_smoothing=smoothing).loss(model, batch)
    double = copy.deepcopy(model).double()
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in batch.inputs.items()}
    with torch.no_grad():
        logits = double(**inputs).logits[:, -batch.labels.shape[1] :]
    total = 0.0
    logs = torch.log_softmax(logits, -1)
    for row, place in (batch.labels != IGNORED).nonzero().tolist():
        line = logs[row, place]
        total -= float((1 - smoothing) * line[batch.labels[row, place]] + smoothing * line.mean())
    assert found.sum.item() == pytest.approx(total, rel=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_with_the_head_on_supervised_rows_is_that_of_all_rows(kind):
    model, processor = tiny_captioner(kind)
    renderer, batch = _batch(model, processor)
    grads = []
    for head in (head_of(model), None):
        model.zero_grad()
        CaptioningObjective(head=head, shape=renderer.shape).loss(model, batch).sum.backward()
        grads.append({name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_the_other_rows_change_nothing(kind):
    model, processor = tiny_captioner(kind)
    renderer = renderer_of(model, processor)
    objective = CaptioningObjective(head=head_of(model), shape=renderer.shape)
    rows = [(sample, 0) for sample in _rows(renderer)]
    whole = objective.loss(model, renderer.assemble(rows))
    single = [objective.loss(model, renderer.assemble([row])) for row in rows]
    assert whole.count == sum(one.count for one in single)
    assert whole.sum.item() == pytest.approx(sum(one.sum.item() for one in single), rel=CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_depends_on_the_picture(kind):
    model, processor = tiny_captioner(kind)
    renderer, batch = _batch(model, processor)
    objective = CaptioningObjective(head=head_of(model), shape=renderer.shape)
    name = next(
        name for name in ("pixel_values", "flattened_patches", "input_values", "input_features") if name in batch.inputs
    )
    before = objective.loss(model, batch).sum.item()
    batch.inputs[name] = batch.inputs[name].flip(0)
    assert abs(objective.loss(model, batch).sum.item() - before) > 1e-6
