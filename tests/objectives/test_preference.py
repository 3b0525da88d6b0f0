"""Answers of real rows: where loss stands, the shared prompt, the reference, and the objectives on tiny models."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmft.data.preference_render import PreferenceBatch
from mmft.data.sample import Candidate, Sample
from mmft.objectives.preference import PreferenceObjective, Settings
from mmft.objectives.preference_forward import answer_logps, share_where_exact
from mmft.objectives.reference import AdapterOff, Kept, make_table
from mmft.objectives.reward import RewardObjective, best_tokens, make_head
from tests.objectives.answers import tiny_preferences, tiny_renderer
from tests.tiny import tiny_vlm

SHARING = ("llava", "smolvlm", "fast_vlm")
EXACT = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    made = tiny_preferences(tmp_path_factory.mktemp("rows"))
    longer = dataclasses.replace(made[0].candidates[1], text="red green blue")
    return [dataclasses.replace(made[0], candidates=(made[0].candidates[0], longer)), *made[1:]]


def adapted(kind: str) -> Any:
    """A tiny model with LoRA whose B is not zero."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_vlm(kind)[0].eval(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    return model.eval()


def head_of(model: Any) -> torch.nn.Module:
    return model.get_base_model().get_output_embeddings()


def batch_of(samples: list[Sample], kind: str = "llava", **how: Any) -> PreferenceBatch:
    return tiny_renderer(kind, **how).assemble([(sample, 0) for sample in samples])


def gradients(model: Any) -> torch.Tensor:
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    return torch.cat(found)


def objective_of(model: Any, **settings: Any) -> PreferenceObjective:
    made = PreferenceObjective(Settings(**settings), head=head_of(model), reference=None)
    if made.name in ("dpo", "kto"):
        made.reference = AdapterOff(model, lambda batch: made.logps(model, batch))
    return made


@pytest.mark.parametrize("share", [False, True])
def test_loss_stands_on_answers_alone(samples: list[Sample], share: bool) -> None:
    renderer = tiny_renderer(share=share)
    batch = renderer.assemble([(sample, 0) for sample in samples])
    tokenizer = renderer.chat.tokenizer
    for number in range(len(batch.owner)):
        text = tokenizer.decode(batch.target[batch.row == number].tolist())
        own = samples[int(batch.owner[number])].candidates[int(batch.rank[number])].text
        assert text.replace("<end>", "").strip() == own
    image = renderer.chat.processor.image_token_id
    assert image not in batch.target.tolist() and image in batch.inputs["input_ids"]
    assert batch.supervised == len(batch.target) == int((batch.labels != -100).sum())


def test_prompt_picture_and_padding_get_no_gradient_of_logits(samples: list[Sample]) -> None:
    model, batch = adapted("llava"), batch_of(samples)
    kept: dict[str, torch.Tensor] = {}
    head = head_of(model)

    def whole(module: Any, args: Any, out: torch.Tensor) -> None:
        if out.requires_grad:
            out.retain_grad()
            kept["logits"] = out

    handle = head.register_forward_hook(whole)
    try:
        loss = objective_of(model).loss(model, batch)
        states = kept["logits"].shape[1]
        loss.sum.backward()
    finally:
        handle.remove()
    assert states == len(batch.target) == int((kept["logits"].grad.abs().sum(-1) > 0).sum())


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_shared_prompt_gives_the_same_loss_and_gradients(samples: list[Sample], kind: str, name: str) -> None:
    model = adapted(kind)
    found = []
    for share in (False, True):
        batch = batch_of(samples, kind, share=share)
        loss = objective_of(model, name=name).loss(model, batch)
        loss.sum.backward()
        found.append((loss.sum.detach(), gradients(model), len(batch.inputs["input_ids"])))
    (plain, slow, rows), (shared, fast, lines) = found
    assert (rows, lines) == (2 * len(samples), len(samples))
    torch.testing.assert_close(shared, plain, **EXACT)
    assert float((fast - slow).norm() / slow.norm()) < 1e-5


def test_vision_runs_once_for_both_answers(samples: list[Sample]) -> None:
    model, seen = adapted("llava"), []
    tower = model.get_base_model().model.vision_tower
    tower.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(
            len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0])
        ),
        with_kwargs=True,
    )
    answer_logps(model, head_of(model), batch_of(samples, share=True))
    assert seen == [len(samples)]


@pytest.mark.parametrize("kind", SHARING)
def test_sharing_is_found_exact(samples: list[Sample], kind: str) -> None:
    model, renderer = adapted(kind), tiny_renderer(kind)
    run = lambda batch: answer_logps(model, head_of(model), batch, tokens=True)  # noqa: E731
    assert share_where_exact(model, renderer, samples, run=run) is None
    assert renderer.share


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama"])
def test_sharing_is_refused_with_a_reason(samples: list[Sample], kind: str) -> None:
    """Three-dimensional positions and cross-attention masks do not follow the shared layout."""
    model, renderer = adapted(kind), tiny_renderer(kind)
    run = lambda batch: answer_logps(model, head_of(model), batch, tokens=True)  # noqa: E731
    assert share_where_exact(model, renderer, samples, run=run)
    assert not renderer.share
    assert torch.isfinite(answer_logps(model, head_of(model), batch_of(samples, kind))).all()


def test_sharing_is_refused_where_an_answer_sees_another(samples: list[Sample]) -> None:
    model, renderer = adapted("llava"), tiny_renderer()

    def leaky(batch: PreferenceBatch) -> torch.Tensor:
        values = answer_logps(model, head_of(model), batch, tokens=True)
        return values + 1e-7 * batch.inputs["input_ids"].sum() if renderer.share else values

    assert "depend on another answer" in (share_where_exact(model, renderer, samples, run=leaky) or "")
    assert not renderer.share


def test_dropout_keeps_answers_apart(samples: list[Sample]) -> None:
    model = get_peft_model(tiny_vlm("llava")[0], LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1))
    renderer = tiny_renderer()
    assert "dropout" in (share_where_exact(model, renderer, samples, run=lambda batch: batch.score) or "")


def test_siblings_are_what_a_whole_render_gives(samples: list[Sample]) -> None:
    for kind in ("llava", "smolvlm", "qwen2_vl", "mllama"):
        renderer = tiny_renderer(kind)
        first, second = renderer.rendered(samples[0])
        swapped = dataclasses.replace(samples[0], candidates=samples[0].candidates[::-1])
        other = renderer.rendered(swapped)
        assert torch.equal(second.input_ids, other[0].input_ids) and torch.equal(second.labels, other[0].labels)
        assert torch.equal(first.input_ids, other[1].input_ids) and torch.equal(first.labels, other[1].labels)


def test_own_pictures_of_an_answer_are_used(samples: list[Sample]) -> None:
    """Pairs of one text with two pictures: never shared, and the two rows' pixels differ."""
    own = Candidate(samples[0].candidates[0].text, media=samples[1].media)
    pair = dataclasses.replace(samples[0], candidates=(samples[0].candidates[0], own))
    batch = batch_of([pair], share=True)
    assert len(batch.inputs["input_ids"]) == 2 and len(batch.inputs["pixel_values"]) == 2


@pytest.mark.parametrize("how", ["crop", "other"])
def test_changed_pictures_are_a_function_of_seed_epoch_and_row(samples: list[Sample], how: Any) -> None:
    def pixels(seed: int, epoch: int) -> torch.Tensor:
        renderer = tiny_renderer(altered=how, seed=seed)
        renderer.pool = samples
        altered = renderer.assemble([(sample, epoch) for sample in samples]).altered
        assert altered is not None and altered.ids == tuple(sample.id for sample in samples)
        return altered.inputs["pixel_values"]

    assert torch.equal(pixels(0, 0), pixels(0, 0))
    batch = batch_of(samples)
    if how == "other":  # three pictures: another epoch may draw the same
        assert not torch.equal(pixels(0, 0), batch.inputs["pixel_values"][: len(samples)])
    model = adapted("llava")
    renderer = tiny_renderer(altered=how)
    renderer.pool = samples
    loss = objective_of(model, image_weight=0.5).loss(model, renderer.assemble([(sample, 0) for sample in samples]))
    assert float(loss.sum) > float(objective_of(model).loss(model, batch).sum)


def test_untrained_policy_is_its_reference(samples: list[Sample]) -> None:
    model = get_peft_model(tiny_vlm("llava")[0].eval(), LoraConfig(r=4, target_modules=["q_proj"]))
    loss = objective_of(model).loss(model, batch_of(samples))
    assert float(loss.sum) == pytest.approx(len(samples) * 0.693147, abs=1e-5)


def test_kept_reference_is_bitwise_the_adapter_off(samples: list[Sample], tmp_path: Path) -> None:
    model, batch = adapted("llava"), batch_of(samples, share=True)
    run = lambda one: answer_logps(model, head_of(model), one)  # noqa: E731
    off = AdapterOff(model, run)
    path = tmp_path / "table.npz"
    table = make_table([batch], off, path=path)
    assert torch.equal(Kept(table)(batch), off(batch))
    again = make_table([], off, path=path)  # read from disk: nothing is computed
    assert again == table
    assert not torch.equal(off(batch), run(batch))
    moved = batch_of(samples[::-1])
    assert sorted(moved.keys) == sorted(batch.keys)
    with pytest.raises(KeyError):
        Kept({})(batch)


def test_kto_takes_thumbs(samples: list[Sample]) -> None:
    from mmft.data.preference import as_thumbs
    from mmft.kinds.preference import mismatched

    rows = mismatched([thumb for sample in samples for thumb in as_thumbs(sample)])
    assert len(rows) == 2 * len(samples)
    assert all(row.candidates[0].text != row.candidates[1].text for row in rows)
    model, batch = adapted("llava"), batch_of(rows)
    loss = objective_of(model, name="kto").loss(model, batch)
    assert loss.count == len(rows) and float(loss.logs["good"]) == len(samples) == float(loss.logs["bad"])
    loss.sum.backward()
    assert gradients(model).abs().sum() > 0


def test_digest_of_an_answer_is_that_of_its_content(samples: list[Sample]) -> None:
    batch = batch_of(samples)
    renamed = batch_of([dataclasses.replace(sample, id=f"x{i}", source="y") for i, sample in enumerate(samples)])
    assert batch.keys == renamed.keys and len(set(batch.keys)) == len(batch.keys)


@pytest.mark.parametrize("share", [False, True])
def test_best_tokens_begin_the_best_answers(samples: list[Sample], share: bool) -> None:
    renderer = tiny_renderer(share=share)
    batch = renderer.assemble([(sample, 0) for sample in samples])
    tokenizer = renderer.chat.tokenizer
    best = [tokenizer.encode(sample.candidates[0].text, add_special_tokens=False)[0] for sample in samples]
    assert best_tokens(batch).tolist() == [best[b] for b in batch.owner.tolist()]


@pytest.mark.parametrize("share", [False, True])
def test_answer_weight_asks_the_last_states_for_the_truth(samples: list[Sample], share: bool) -> None:
    """The term is the cross-entropy at the answers' last tokens, by a plain forward of each answer alone."""
    model, batch = adapted("llava"), batch_of(samples, share=share)
    head = make_head(model.get_base_model().config.get_text_config().hidden_size)
    torch.nn.init.normal_(head.weight)
    plain = RewardObjective(vocabulary=head_of(model), head=head)
    asked = RewardObjective(vocabulary=head_of(model), head=head, answer_weight=0.5)
    one, other = plain.loss(model, batch), asked.loss(model, batch)
    single, wanted = tiny_renderer(), torch.zeros(())
    for sample in samples:
        alone = single.assemble([(sample, 0)])
        logits = model(**alone.inputs, use_cache=False).logits.flatten(0, 1)[alone.last].float()
        wanted = wanted + torch.nn.functional.cross_entropy(logits, best_tokens(alone))
    torch.testing.assert_close(other.sum - one.sum, 0.5 * wanted, **EXACT)
    assert "truth_known" in asked.metrics and "truth_known" not in plain.metrics
    other.sum.backward()
    assert gradients(model).norm() > 0
