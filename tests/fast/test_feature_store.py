"""Features in the place of pixels: the same numbers, no picture opened twice, refused where it would not be exact."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmft.data.formats import load_all
from mmft.data.loader import assemble
from mmft.data.order import StepPlan
from mmft.data.render import Renderer
from mmft.data.sample import MediaRef
from mmft.fast import feature_store, native_build
from mmft.fast.feature_store import holds
from mmft.fast.plan import Setting
from mmft.fast.slabs import cache_folder
from mmft.fast.stored import address
from mmft.fast.tower import Tower
from mmft.recipe.schema import AdapterSection, DataSection, DataSource, PartAdapter
from tests.fast.small import apart, batch_of, both, loss_and_gradients, small_setting

KINDS = ("llava", "smolvlm", "qwen2_vl", "fast_vlm")
ROWS = 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_pixels(tmp_path, kind):
    setting = small_setting(tmp_path, kind)
    plain, plan, work = both(setting, "feature_store")
    assert plan.on("feature_store"), plan.table()
    for turn in ("empty", "full"):
        for row in range(2):  # one row: the tower's batch has the same shape, so all bits are the same
            want, grads = loss_and_gradients(plain, setting, [row])
            loss, found = loss_and_gradients(work, setting, [row])
            assert loss == want and torch.equal(found, grads), turn
        want, grads = loss_and_gradients(plain, setting, range(ROWS))
        loss, found = loss_and_gradients(work, setting, range(ROWS))
        assert loss == pytest.approx(want, rel=1e-6) and apart(found, grads) < 1e-6, turn


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_picture_is_not_opened(tmp_path, kind, monkeypatch):
    setting = small_setting(tmp_path, kind)
    _, _, work = both(setting, "feature_store")
    first = batch_of(work, setting, range(ROWS))
    assert work.renderer.opened == ROWS

    def never(*_, **__):
        raise AssertionError("a picture was opened")

    monkeypatch.setattr("mmft.data.opened.open_image", never)
    again = batch_of(work, setting, range(ROWS))
    assert {n for n in again.inputs if n.startswith("pixel")} == set()
    for name in set(first.inputs) - {"mm_encoder_outputs"}:
        assert torch.equal(first.inputs[name], again.inputs[name]), name
    assert torch.equal(first.labels, again.labels) and first.tokens == again.tokens


def test_another_question_about_a_known_picture(tmp_path):
    """Ids, labels and grids of a text that the store has never seen, and of rows with two pictures and none."""
    for kind in ("llava", "qwen2_vl"):
        setting = small_setting(tmp_path, kind)
        _, _, work = both(setting, "feature_store")
        batch_of(work, setting, range(ROWS))
        image = {"type": "image"}
        turns = [
            {"role": "user", "content": [{"type": "text", "text": "Look, "}, image, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "Nothing, I see nothing."},
            {"role": "user", "content": "And now?"},
            {"role": "assistant", "content": "red"},
        ]
        two = [{"role": "user", "content": [image, image, {"type": "text", "text": "Same?"}]}, turns[-1]]
        none = [{"role": "user", "content": "Hello"}, turns[-1]]
        rows = [(turns, ["0-0.png"]), (two, ["0-0.png", "0-1.png"]), (none, [])]
        path = tmp_path / "data-8" / "more.jsonl"
        path.write_text("".join(json.dumps({"messages": m, "images": i}) + "\n" for m, i in rows))
        source = DataSource(path=str(path))
        samples = load_all((source,), DataSection(train=(source,)), 0)
        for sample in samples:
            for _ in range(2):
                plain, found = setting.renderer.render(sample), work.renderer.render(sample)
                assert torch.equal(plain.input_ids, found.input_ids) and torch.equal(plain.labels, found.labels)
                for name in found.media:
                    assert torch.equal(plain.media[name], found.media[name]), name
                opened = work.renderer.opened
                batch_of(work, replace(setting, samples=[sample]), [0])
        assert work.renderer.opened == opened, "the second time nothing is opened"
        more = replace(setting, samples=samples)
        plain_work, _, _ = both(setting, "head_rows")
        want, grads = loss_and_gradients(plain_work, more, range(3))
        loss, found = loss_and_gradients(work, more, range(3))
        assert loss == pytest.approx(want, rel=1e-5) and apart(found, grads) < 1e-5


def test_a_later_run_and_another_process_find_everything(tmp_path):
    setting = small_setting(tmp_path)
    _, _, work = both(setting, "feature_store")
    first = loss_and_gradients(work, setting, range(ROWS))
    _, _, later = both(small_setting(tmp_path), "feature_store")
    second = loss_and_gradients(later, setting, range(ROWS))
    assert later.prepare.misses == 0 and later.renderer.opened == 0
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def _space(setting: Setting, *, autocast: bool = False) -> str:
    return Tower(setting.adapted, autocast=autocast).digest(setting.renderer.processor)


def test_one_weight_one_setting_one_pixel_are_misses(tmp_path):
    setting = small_setting(tmp_path)
    spaces = {_space(setting), _space(setting, autocast=True)}
    assert _space(small_setting(tmp_path)) in spaces, "the same model read again is the same space"
    language = next(v for n, v in setting.adapted.backbone.model.named_parameters() if "language" in n)
    language.data.flatten()[0] += 1.0
    assert _space(setting) in spaces, "the language model does not count"
    for part in ("vision_tower", "multi_modal_projector"):
        weight = next(v for n, v in setting.adapted.backbone.model.named_parameters() if part in n)
        weight.data.flatten()[0] += 1e-3
        spaces.add(_space(setting))
    for name, value in (("image_mean", [0.4, 0.4, 0.4]), ("do_rescale", False)):
        setattr(setting.renderer.processor.image_processor, name, value)
        spaces.add(_space(setting))
    setting.adapted.backbone.model.config.vision_config._attn_implementation = "eager"
    spaces.add(_space(setting))
    setting.adapted.backbone.model.config.vision_feature_layer = -2
    spaces.add(_space(setting))
    assert len(spaces) == 8
    _, _, work = both(small_setting(tmp_path), "feature_store")
    batch_of(work, setting, [0])
    path = tmp_path / "data-8" / str(setting.samples[0].media[0].path)
    image = Image.open(path)
    image.putpixel((3, 3), (1, 2, 3))
    image.save(path)
    before = work.prepare.misses
    batch_of(work, setting, [0])
    assert work.prepare.misses == before + 1


def test_other_kernels_are_misses(tmp_path, monkeypatch):
    """None, the built ones, and those of a source with another line."""
    setting = small_setting(tmp_path)
    spaces = [_space(setting)]
    monkeypatch.setattr(native_build._Chosen, "library", object())
    monkeypatch.setattr(native_build, "digest", lambda: "one")
    spaces += [_space(setting), _space(setting)]
    monkeypatch.setattr(native_build, "digest", lambda: "another")
    spaces.append(_space(setting))
    assert spaces[1] == spaces[2] and len(set(spaces)) == 3


def test_a_torn_entry_is_computed_again(tmp_path):
    setting = small_setting(tmp_path)
    _, _, work = both(setting, "feature_store")
    want = loss_and_gradients(work, setting, range(ROWS))
    (path,) = Path(cache_folder()).rglob("*.slab")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 + 500] ^= 255
    path.write_bytes(data)
    _, _, again = both(setting, "feature_store")
    found = loss_and_gradients(again, setting, range(ROWS))
    assert again.prepare.misses == 1 and found[0] == want[0] and torch.equal(found[1], want[1])


def test_a_full_cache_changes_no_number(tmp_path, monkeypatch):
    setting = small_setting(tmp_path)
    _, _, work = both(setting, "feature_store")
    want = loss_and_gradients(work, setting, range(ROWS))
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("MMFT_CACHE_SIZE", "10")
    _, _, full = both(setting, "feature_store")
    for _ in range(2):
        found = loss_and_gradients(full, setting, range(ROWS))
        assert found[0] == want[0] and torch.equal(found[1], want[1])
    assert full.renderer.slabs.full and full.renderer.opened == 2 * ROWS


WHOLE = AdapterSection(lora_rank=4, targets=("language", "projector"), parts={"projector": PartAdapter(mode="full")})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"adapter": AdapterSection(lora_rank=4, targets=("vision", "language"))}, "vision is trained"),
        ({"adapter": AdapterSection(lora_rank=4, targets=("language", "projector"))}, "projector is trained"),
        ({"adapter": WHOLE}, "projector is trained"),
        ({"adapter": AdapterSection(method="prompt", targets=("language",))}, "prompt tuning"),
        ({"kind": "mllama"}, "takes no features"),
    ],
)
def test_where_it_would_not_be_exact_it_says_why(tmp_path, change, reason):
    on, told = holds(small_setting(tmp_path, **change))
    assert not on and reason in told


def test_no_picture_other_rows_and_shrinking_say_why(tmp_path):
    setting = small_setting(tmp_path)
    assert holds(setting)[0]
    bare = [replace(one, media=()) for one in setting.samples]
    assert "no row has a picture" in holds(replace(setting, samples=bare))[1]
    for change in ({"over_length": "shrink_images"}, {"augmentation": {"flip": 0.5}}):
        data = setting.recipe.data.model_copy(update=change)
        other = replace(setting, recipe=setting.recipe.model_copy(update={"data": data}))
        on, told = holds(other)
        assert not on and next(iter(change)) in told
    sound = replace(setting.samples[0], media=(MediaRef(kind="audio", path="x.wav", root=tmp_path),))
    assert "a row holds audio" in holds(replace(setting, evals=[sound]))[1]

    class Own(Renderer):
        pass

    assert "a way of their own" in holds(replace(setting, renderer=Own(setting.renderer.processor, max_length=9)))[1]


def test_dropout_in_the_tower_and_a_wrong_feature_are_found_at_the_start(tmp_path, monkeypatch):
    setting = small_setting(tmp_path)
    tower = next(m for n, m in setting.adapted.backbone.model.named_modules() if n.endswith("vision_tower"))
    tower.extra = torch.nn.Dropout(0.1)
    monkeypatch.setattr(feature_store, "set_modes", lambda adapted: adapted.model.train())
    rows = {row.name: row for row in both(setting, "feature_store")[1].rows}
    assert "dropout is active" in rows["feature_store"].reason and not rows["feature_store"].on
    monkeypatch.undo()
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    own = Tower.__call__
    monkeypatch.setattr(Tower, "__call__", lambda self, inputs: {n: v * 1.01 for n, v in own(self, inputs).items()})
    _, plan, work = both(small_setting(tmp_path), "feature_store")
    row = next(row for row in plan.rows if row.name == "feature_store")
    assert not row.on and "logits with features differ" in row.reason
    assert type(work.renderer) is Renderer


@pytest.mark.parametrize("kind", ["llava", "smolvlm", "qwen2_vl"])
def test_with_packing_and_shared_beginnings(tmp_path, kind):
    """A line of rows, two of which ask about one picture: its features are there once."""
    setting = small_setting(tmp_path, kind)
    twice = [setting.samples[0], replace(setting.samples[0], id="again"), *setting.samples[1:3]]
    setting = replace(setting, samples=twice, steps=StepPlan(rows=4, micro_batch=4, micro_per_step=1))
    plain, plan, work = both(setting, "feature_store", "packing", "shared_prefix")
    assert all(plan.on(name) for name in ("feature_store", "packing", "shared_prefix")), plan.table()
    for _ in range(2):
        batch = batch_of(work, setting, range(4))
        assert len(batch.pictures) == 3 and batch.inputs["input_ids"].shape[0] == 1
        want, grads = loss_and_gradients(plain, setting, range(4))
        loss, found = loss_and_gradients(work, setting, range(4))
        assert loss == pytest.approx(want, rel=1e-5) and apart(found, grads) < 1e-5
    work.release()


def test_pixels_are_held_in_the_towers_type_and_until_it_has_answered(tmp_path):
    """A batch that is placed again (it did not fit) has features by then."""
    setting = small_setting(tmp_path)
    _, _, work = both(setting, "feature_store")
    assert work.renderer.dtype == setting.adapted.backbone.model.dtype
    work.renderer.dtype = torch.bfloat16
    narrow = assemble(work.renderer, [(setting.samples[0], 0)], pad_token_id=0)
    assert narrow.pictures[0].inputs["pixel_values"].dtype == torch.bfloat16
    work.renderer.dtype = torch.float32
    batch = assemble(work.renderer, [(setting.samples[row], 0) for row in range(ROWS)], pad_token_id=0)
    pixels = [weakref.ref(one.inputs["pixel_values"]) for one in batch.pictures]
    (first,) = work.prepare(batch).inputs["mm_encoder_outputs"].values()
    misses = work.prepare.misses
    assert pixels and not any(one() is not None for one in pixels)
    (again,) = work.prepare(batch).inputs["mm_encoder_outputs"].values()
    pairs = zip(first.pooler_output, again.pooler_output, strict=True)
    assert work.prepare.misses == misses and all(torch.equal(one, two) for one, two in pairs)


def test_a_place_whose_tokens_might_merge_with_text_is_not_kept(tmp_path):
    """Its features are computed alone each time, so that no number depends on what is kept."""
    setting = small_setting(tmp_path)
    _, _, work = both(setting, "feature_store")
    work.renderer._solid = set()
    found = [loss_and_gradients(work, setting, range(ROWS)) for _ in range(2)]
    assert work.prepare.misses == 2 * ROWS and len(work.renderer.slabs) == 0
    work.renderer._solid = {*work.renderer.tokenizer.all_special_ids, *work.renderer.tokenizer.added_tokens_decoder}
    kept = loss_and_gradients(work, setting, range(ROWS))
    assert all(one[0] == kept[0] and torch.equal(one[1], kept[1]) for one in found)


def test_an_address_is_of_pictures_and_tower(tmp_path):
    """In their order, and of nothing else."""
    one, two = (sample.media[0] for sample in small_setting(tmp_path).samples[:2])
    found = [address(media, space) for space in ("a", "b") for media in ((one,), (two,), (one, two), (two, one))]
    assert (
        len(set(found)) == 8
        and address((replace(one, path=None, data=(one.root / one.path).read_bytes()),), "a") == found[0]
    )


def test_features_are_computed_as_a_step_computes_them(tmp_path):
    """Under the step's autocast: a tower read in float32 says other numbers there."""
    setting = small_setting(tmp_path)
    plain = setting.renderer.render(setting.samples[0])
    inputs = {name: value for name, value in plain.media.items() if name.startswith("pixel")}
    model = setting.adapted.backbone.model
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model.get_image_features(**inputs, return_dict=True).pooler_output[0]
    found = Tower(setting.adapted, autocast=True)(inputs)["pooler_output/0"]
    exact = Tower(setting.adapted, autocast=False)(inputs)["pooler_output/0"]
    assert torch.equal(found, wanted) and not torch.equal(found, exact.to(found.dtype))
