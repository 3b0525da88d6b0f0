"""The head on supervised rows equals the plain loss: value and every gradient, in fp32."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from mmft.data.collate import Batch
from mmft.errors import BackboneError
from mmft.objectives.build import build_sft
from mmft.objectives.sft import SftObjective
from mmft.recipe.schema import ObjectiveSection
from tests.tiny import tiny_inputs, tiny_vlm

KINDS = ("llava", "smolvlm", "qwen2_vl", "mllama")


def make_batch(kind: str, *, supervised: int = 3) -> Batch:
    inputs = tiny_inputs(kind, batch=2)
    ids = inputs["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[0, -supervised:] = ids[0, -supervised:]
    labels[1, -1:] = ids[1, -1:]
    count = int((labels[:, 1:] != -100).sum())
    inputs = {key: value for key, value in inputs.items() if key != "labels"}
    return Batch(inputs, labels, ("a", "b"), supervised=count, tokens=ids.numel(), padding=0)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_equals_plain_loss(kind: str, smoothing: float) -> None:
    model, _ = tiny_vlm(kind)
    batch = make_batch(kind)
    model.zero_grad()
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1].float()
    plain = F.cross_entropy(
        logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum", label_smoothing=smoothing
    )
    plain.backward()
    wanted = gradients(model)
    model.zero_grad()
    loss = SftObjective(head=model.get_output_embeddings(), label_smoothing=smoothing).loss(model, batch)
    loss.sum.backward()
    assert loss.count == batch.supervised == 4
    # 1e-5: the same fp32 products, in another order.
    torch.testing.assert_close(loss.sum, plain, rtol=1e-5, atol=1e-5)
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_equals_transformers_own_loss() -> None:
    model, _ = tiny_vlm("llava")
    batch = make_batch("llava")
    plain = model(**batch.inputs, labels=batch.labels, use_cache=False).loss
    loss = SftObjective(head=model.get_output_embeddings()).loss(model, batch)
    torch.testing.assert_close(loss.sum / loss.count, plain, rtol=1e-5, atol=1e-5)


def test_head_computes_supervised_rows_only() -> None:
    model, _ = tiny_vlm("llava")
    batch = make_batch("llava")
    seen: list[tuple[int, ...]] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    SftObjective(head=head).loss(model, batch)
    handle.remove()
    assert [shape[:2] for shape in seen] == [(1, 4)]
    assert not head._forward_pre_hooks


def test_a_batch_without_supervision_gives_zero_gradient() -> None:
    model, _ = tiny_vlm("llava")
    batch = make_batch("llava")
    batch = dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100), supervised=0)
    loss = SftObjective(head=model.get_output_embeddings()).loss(model, batch)
    loss.sum.backward()
    assert float(loss.sum) == 0.0
    assert loss.count == 0
    assert all(float(grad.abs().max()) == 0.0 for grad in gradients(model).values())


def test_hidden_states_of_another_length_are_refused() -> None:
    model, _ = tiny_vlm("llava")
    batch = make_batch("llava")
    short = dataclasses.replace(batch, labels=batch.labels[:, 1:])
    with pytest.raises(BackboneError, match="the vocabulary head gets hidden states of shape"):
        SftObjective(head=model.get_output_embeddings()).loss(model, short)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_correct_counts_greedy_hits() -> None:
    model, _ = tiny_vlm("llava")
    batch = make_batch("llava")
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    wanted = batch.labels[:, 1:]
    expected = int(((logits.argmax(-1) == wanted) & (wanted != -100)).sum())
    objective = build_sft(ObjectiveSection(), model)
    assert int(objective.loss(model, batch).logs["correct"]) == expected


def test_virtual_tokens_have_no_row() -> None:
    """Prompt tuning puts states before those of the text; they are no position of a label."""
    from peft import PromptTuningConfig, get_peft_model

    model, _ = tiny_vlm("llava")
    batch = make_batch("llava")
    text = {key: value for key, value in batch.inputs.items() if not key.startswith("pixel")}
    batch = dataclasses.replace(batch, inputs={**text, "input_ids": text["input_ids"].clamp(max=20)})
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    logits = tuned(**batch.inputs, use_cache=False).logits[:, 3:-1]
    plain = F.cross_entropy(logits.flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
    objective = build_sft(ObjectiveSection(), tuned)
    assert objective.ahead == 3
    for one in (objective, objective.on_every_position()):
        torch.testing.assert_close(one.loss(tuned, batch).sum, plain, rtol=1e-5, atol=1e-5)


def test_softmax_is_taken_in_float32() -> None:
    """Logits in bfloat16 are as exact as a product can make them; their log-softmax would not be."""
    model = copy.deepcopy(tiny_vlm("llava")[0]).bfloat16()
    batch = make_batch("llava")
    inputs = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.inputs.items()}
    batch = dataclasses.replace(batch, inputs=inputs)
    loss = SftObjective(head=model.get_output_embeddings()).loss(model, batch)
    rows = model(**batch.inputs, use_cache=False).logits[:, :-1][batch.labels[:, 1:] != -100]
    wanted = batch.labels[:, 1:][batch.labels[:, 1:] != -100]
    assert rows.dtype == torch.bfloat16 and loss.sum.dtype == torch.float32
    torch.testing.assert_close(loss.sum, F.cross_entropy(rows.float(), wanted, reduction="sum"), rtol=1e-6, atol=1e-6)
