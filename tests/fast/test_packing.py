"""A packed step is the plain step: loss and every LoRA gradient in float32; where it would not be, it is not packed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mmft.adapters.build import set_modes
from mmft.data.order import StepPlan
from mmft.data.packing import PackedRenderer, pack, shown_alike
from mmft.data.render import Renderer
from mmft.engine.memory import checkpoint_layers
from mmft.errors import BackboneError, RecipeError
from mmft.fast import packed_attention
from mmft.fast.attention import choose_products
from mmft.fast.packing import demand
from mmft.fast.plan import fast_plan
from tests.data.test_loader import same
from tests.fast.packs import KNOWN, ROWS, adapted, apart, batches_of, plain, put_in, samples, setting, take

STEPS = StepPlan(ROWS, 2, 4)
KINDS = ("llava", "smolvlm", "qwen2_vl", "fast_vlm", "window")
EXACT = 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_step_is_the_plain_step(kind):
    """Rows without a picture, with one and with two in one line; the gradients are of about 30,000 weights."""
    model = adapted(kind)
    here = setting(model, samples(0, bare=kind != "fast_vlm"), STEPS, fast=["packing"])
    set_modes(model)
    wanted = [take(here, plain(here), number) for number in range(2)]
    plan, work = put_in(here)
    assert plan.on("packing") and isinstance(work.renderer, PackedRenderer), plan.table()
    config = model.backbone.model.config
    assert config.text_config._attn_implementation == packed_attention.NAME
    assert config.vision_config._attn_implementation != packed_attention.NAME  # towers keep their own
    for number in range(2):
        found = take(here, work, number)
        assert found.count == wanted[number].count
        assert found.loss == pytest.approx(wanted[number].loss, rel=EXACT)
        assert apart(found.gradient, wanted[number].gradient) < EXACT
        assert found.tokens < wanted[number].tokens and found.forwards <= 4
    work.release()
    after = take(here, plain(here))
    assert after.loss == wanted[0].loss and torch.equal(after.gradient, wanted[0].gradient)


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl", "window"])
def test_a_shared_beginning_is_the_plain_step(kind):
    model = adapted(kind)
    rows = samples(1, bare=True)
    alone = setting(model, rows, STEPS, fast=["packing"], train_sampling_strategy="group_by_media")
    here = replace(alone, recipe=setting(model, rows, STEPS, fast=["packing", "shared_prefix"]).recipe)
    set_modes(model)
    wanted = [take(here, plain(here), number) for number in range(2)]
    _, lines = put_in(alone)
    in_lines = [sum(batch.labels.numel() for batch in batches_of(alone, lines, number)) for number in range(2)]
    lines.release()
    plan, work = put_in(here)
    assert plan.on("shared_prefix"), plan.table()
    for number in range(2):
        found = take(here, work, number)
        assert (found.count, found.loss) == (wanted[number].count, pytest.approx(wanted[number].loss, rel=EXACT))
        assert apart(found.gradient, wanted[number].gradient) < EXACT
        assert found.tokens < in_lines[number] < wanted[number].tokens
    work.release()


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl"])
def test_random_lengths(kind):
    """Ten data sets of random lengths, packs of one to many rows."""
    model = adapted(kind)
    set_modes(model)
    for seed in range(10):
        steps = StepPlan(ROWS, 1 + seed % 3, 4, 1, seed)
        here = setting(model, samples(seed, longest=4 + 40 * (seed % 3)), steps)
        wanted = take(here, plain(here))
        _, work = put_in(here)
        found = take(here, work)
        work.release()
        assert found.loss == pytest.approx(wanted.loss, rel=EXACT) and apart(found.gradient, wanted.gradient) < EXACT


def test_recomputed_layers_keep_their_rows_apart():
    """The table of rows goes through checkpointing with the other arguments of a layer."""
    model = adapted("llava")
    here = setting(model, samples(0), STEPS)
    wanted = take(here, plain(here))
    layers, seen = checkpoint_layers(model), []
    _, work = put_in(here)
    set_modes(model)
    for layer in layers:
        layer.training = True
    handle = layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    found = take(here, work)
    handle.remove()
    assert len(seen) == 2 * found.forwards  # each forward once more in the backward pass
    assert apart(found.gradient, wanted.gradient) < EXACT
    work.release()


@pytest.mark.parametrize("kind", ["llava", "window"])
def test_with_attention_by_products(kind):
    """The other attention of a CPU, which a run may choose: masks of windows and shared beginnings fit it too."""
    model = adapted(kind)
    here = setting(model, samples(1), STEPS, train_sampling_strategy="group_by_media")
    wanted = take(here, plain(here))
    plan, work = put_in(here)
    assert plan.on("shared_prefix")
    before = choose_products(True)
    try:
        found = take(here, work)
    finally:
        choose_products(before)
        work.release()
    assert found.loss == pytest.approx(wanted.loss, rel=EXACT) and apart(found.gradient, wanted.gradient) < EXACT


def test_a_picture_is_opened_once_for_all_its_questions(monkeypatch):
    rows = samples(1, bare=False)[:6]
    renderer = Renderer(adapted("llava").backbone.processor, max_length=512)
    each = [renderer.render(row) for row in rows]
    opened, plain_open = [], renderer.opener.open
    monkeypatch.setattr(renderer.opener, "open", lambda ref: opened.append(ref) or plain_open(ref))
    found = PackedRenderer(renderer, share=True).assemble([(row, 0) for row in rows])
    shown = shown_alike([row.media for row in rows]).tolist()
    assert len(opened) == len(set(shown)) < len(rows)
    wanted = pack(each, shown=shown, media_ids=renderer.media_ids)
    assert same(found, wanted)


def test_the_order_of_the_packs_does_not_matter():
    model = adapted("llava")
    here = setting(model, samples(2), STEPS)
    _, work = put_in(here)
    one, two = take(here, work), take(here, work, backwards=True)
    assert one.forwards > 1 and apart(two.gradient, one.gradient) < 1e-6
    work.release()


def test_sixteen_bits_err_no_more_than_the_plain_path():
    """Gradients against those of float32, for both paths on the same rounded weights."""
    errors = {}
    exact = adapted("llava")
    rounded = adapted("llava", dtype="bfloat16")
    exact.backbone.model.load_state_dict(
        {name: value.float() for name, value in rounded.backbone.model.state_dict().items()}
    )
    rows = samples(3)
    truth = take(setting(exact, rows, STEPS), plain(setting(exact, rows, STEPS)))
    here = setting(rounded, rows, STEPS)
    errors["plain"] = apart(take(here, plain(here)).gradient.float(), truth.gradient)
    plan, work = put_in(here)
    assert plan.on("packing") and isinstance(work.renderer, PackedRenderer), plan.table()
    errors["packed"] = apart(take(here, work).gradient.float(), truth.gradient)
    work.release()
    assert errors["packed"] < 1.1 * errors["plain"] < 0.1


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "window"])
def test_a_model_with_another_attention_is_packed_too(kind):
    """Chosen by the recipe; it has it again afterwards, and its towers keep it."""
    model = adapted(kind, attention="eager")
    here = setting(model, samples(0), STEPS, fast=["packing"])
    set_modes(model)
    wanted = take(here, plain(here))
    plan, work = put_in(here)
    config = model.backbone.model.config
    assert plan.on("packing") and isinstance(work.renderer, PackedRenderer), plan.table()
    assert config.vision_config._attn_implementation == "eager"
    found = take(here, work)
    work.release()
    assert config.text_config._attn_implementation == "eager"
    assert found.loss == pytest.approx(wanted.loss, rel=EXACT) and apart(found.gradient, wanted.gradient) < EXACT


# ---------------------------------------------------------------- what cannot be packed


def test_an_attention_that_cannot_be_exchanged_is_the_reason(monkeypatch):
    """Rows are sorted by length then."""
    model = adapted("llava")
    owner = model.backbone.model.model.language_model

    def never(name: str) -> None:
        raise ValueError(f"{name} is not for this model")

    monkeypatch.setattr(owner, "set_attn_implementation", never)
    plan, work = put_in(setting(model, samples(0), STEPS))
    assert "sorted by length" in plan.rows[0].reason and "is not for this model" in plan.rows[0].reason
    assert not isinstance(work.renderer, PackedRenderer) and not plan.on("shared_prefix")


@pytest.mark.parametrize("extra", [{"softcap": 5.0}, {"s_aux": torch.zeros(2)}, {"position_bias": torch.zeros(1)}])
def test_what_a_line_does_not_do_is_no_silent_loss(extra):
    """Soft caps, sinks and biases of a model: it refuses the line, which is then the reason."""
    states = torch.zeros(1, 2, 4, 8)
    table = torch.tensor([[[[0, 4, 0, 0]]]])
    with pytest.raises(BackboneError, match=f"{next(iter(extra))} cannot be packed"):
        packed_attention.packed_attention(nn.Module(), states, states, states, table, **extra)


class _Shift(nn.Module):
    """A layer that mixes neighbouring tokens, as short convolutions and recurrences do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        before = torch.cat((torch.zeros_like(hidden[:, :1]), hidden[:, :-1]), 1)
        return self.inner(hidden + before)


def test_a_layer_that_mixes_neighbours_is_found_out():
    """No name tells it; the proof does. Rows sorted by length are exact there too, and pad less."""
    model = adapted("llava")
    layer = model.backbone.model.model.language_model.layers[0]
    layer.input_layernorm = _Shift(layer.input_layernorm)
    here = setting(model, samples(0), STEPS)
    wanted = take(here, plain(here))
    plan, work = put_in(here)
    row = plan.rows[0]
    assert row.on and "sorted by length" in row.reason and "another row's text changes" in row.reason
    assert work.renderer is here.renderer and not plan.on("shared_prefix")
    found = take(here, work)
    assert found.loss == pytest.approx(wanted.loss, rel=EXACT) and apart(found.gradient, wanted.gradient) < EXACT
    assert found.tokens < wanted.tokens
    work.release()


def test_cross_attention_is_sorted_by_length():
    model = adapted("mllama")
    here = setting(model, samples(0, bare=False), STEPS)
    wanted = take(here, plain(here))
    plan, work = put_in(here)
    assert plan.rows[0].on and "sorted by length" in plan.rows[0].reason
    found = take(here, work)
    assert apart(found.gradient, wanted.gradient) < EXACT and found.tokens < wanted.tokens
    work.release()


def test_behind_virtual_tokens_rows_are_sorted_by_length():
    model = adapted("llava", method="prompt", num_virtual_tokens=3)
    here = setting(model, samples(0), STEPS)
    section = here.recipe.adapter.model_copy(update={"method": "prompt"})
    here = replace(here, recipe=here.recipe.model_copy(update={"adapter": section}))
    wanted = take(here, plain(here))
    plan, work = put_in(here)
    assert plan.rows[0].on and "virtual tokens" in plan.rows[0].reason
    found = take(here, work)
    assert found.loss == pytest.approx(wanted.loss, rel=EXACT) and apart(found.gradient, wanted.gradient) < EXACT
    work.release()


def test_rows_that_change_with_their_company_stay_where_they_are():
    """A row of mllama with one picture sees other zeros beside one with two."""
    here = setting(adapted("mllama"), samples(0), STEPS)
    plan, work = put_in(here)
    assert not plan.on("packing") and "with the rows it is padded with" in plan.rows[0].reason
    assert work.steps is here.steps and work.renderer is here.renderer


def test_one_forward_a_step_leaves_nothing_to_sort():
    model = adapted("mllama")
    plan, work = put_in(setting(model, samples(0, bare=False), StepPlan(ROWS, 8, 1)))
    assert not plan.on("packing") and "a step is one forward" in plan.rows[0].reason


def test_a_window_that_the_attention_is_not_told_of():
    """Shorter rows than the window would prove nothing about longer ones."""
    model = adapted("llava")
    model.backbone.model.config.text_config.sliding_window = 30
    plan, work = put_in(setting(model, samples(0), STEPS))
    assert "not told of its window of 30" in plan.rows[0].reason
    work.release()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"packing": False}, "switched off by train.packing"),
        ({"fast": ["head_rows"]}, "switched off by train.fast"),
    ],
)
def test_switches(changes, reason):
    here = setting(adapted("llava"), samples(0), STEPS, **changes)
    plan, work = put_in(here)
    assert not plan.on("packing") and plan.rows[0].reason == reason and work.renderer is here.renderer


def test_dropout_is_left_alone():
    """Its masks go by the shape of a batch: another batch would be another run."""
    model = adapted("llava", lora_dropout=0.1)
    here = setting(model, samples(0), STEPS)
    assert not put_in(here)[0].on("packing")  # found in the model
    recipe = here.recipe.model_copy(update={"adapter": here.recipe.adapter.model_copy(update={"lora_dropout": 0.1})})
    assert "lora_dropout" in fast_plan(replace(here, recipe=recipe), KNOWN).rows[0].reason  # and told by mmft plan


def test_packing_that_was_asked_for_is_refused_with_the_reason():
    here = setting(adapted("mllama"), samples(0), STEPS, packing=True)
    plan, _ = put_in(here)
    with pytest.raises(RecipeError, match="rows cannot be packed") as caught:
        demand(here.recipe, plan)
    assert caught.value.problems[0].where == "train.packing"
    demand(setting(adapted("llava"), [], STEPS, packing=True, fast=False).recipe, plan)  # --plain asks for nothing


def test_the_plan_counts_what_is_saved():
    here = setting(adapted("llava"), samples(1), STEPS, train_sampling_strategy="random")
    rows = {row.name: row for row in fast_plan(here, KNOWN).rows}
    assert "padding" in rows["packing"].saves and "-> 0% of the tokens" in rows["packing"].saves
    assert "group_by_media" in rows["shared_prefix"].reason and "of the pictures" in rows["shared_prefix"].saves


def test_pictures_that_change_by_themselves_are_not_shared():
    from mmft.data.augment import Augmentation

    changes = Augmentation.of({"rotate": 20.0}, seed=0)
    rows = [replace(sample, augment=changes) for sample in samples(1)]
    here = setting(adapted("llava"), rows, STEPS, train_sampling_strategy="group_by_media")
    assert "data.augmentation" in fast_plan(here, KNOWN).rows[1].reason
    assert fast_plan(here, KNOWN).on("packing")


def test_rows_of_their_own_pictures_share_nothing(tmp_path: Path):
    here = setting(adapted("llava"), samples(0)[:1], StepPlan(1, 1, 1))
    assert "pictures of its own" in fast_plan(here, KNOWN).rows[1].reason
