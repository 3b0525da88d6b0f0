"""Rows of captions: what the decoder reads and says, several captions of a picture, prompts, padding."""

from __future__ import annotations

import pytest
import torch
import transformers

from mmft.data.captions import CaptionRenderer, caption_shape
from mmft.data.render import IGNORED
from mmft.errors import BackboneError, DataError
from tests.objectives.captioners import renderer_of, samples, tiny_captioner


def _text(processor, ids):
    return processor.tokenizer.decode([token for token in ids if token > 3])


@pytest.mark.parametrize("kind", ["bart", "bert", "git", "blip", "florence2"])
def test_the_decoder_is_one_token_behind_what_it_says(kind):
    model, processor = tiny_captioner(kind)
    renderer = renderer_of(model, processor, captions=0)
    batch = renderer.assemble([(sample, 0) for sample in samples(2)])
    read = batch.inputs[renderer.shape.text]
    assert len(read) == 4 and batch.ids == ("s0", "s1")  # two captions of each picture
    assert batch.inputs["pixel_values"].shape[0] == 4
    for row, labels, text in zip(read, batch.labels, ("red", "one red thing", "a green square"), strict=False):
        said = labels[labels != IGNORED]
        assert said[-1] == renderer.end == 2
        assert _text(processor, said.tolist()) == text
        places = (labels != IGNORED).nonzero()[:, 0]
        assert torch.equal(row[places[1:]], said[:-1])  # reads what it has said
    assert int(read[0, 0]) == {"florence2": 2, "blip": 5}.get(kind, 1)
    assert batch.tokens + batch.padding == read.numel()


@pytest.mark.parametrize("kind", ["bart", "git", "blip"])
def test_a_prompt_stands_before_the_caption_without_loss(kind):
    model, processor = tiny_captioner(kind)
    renderer = renderer_of(model, processor, prompt="it is")
    batch = renderer.assemble([(samples(1)[0], 0)])
    read = batch.inputs[renderer.shape.text][0].tolist()
    caption = renderer.chosen(samples(1)[0], 0)[0]
    assert _text(processor, read).replace("\x05", "").endswith(f"it is {caption}")
    assert _text(processor, batch.labels[0][batch.labels[0] != IGNORED].tolist()) == f" {caption}"


def test_a_prompt_of_florence_goes_to_the_encoder():
    model, processor = tiny_captioner("florence2")
    renderer = renderer_of(model, processor, prompt="<CAPTION>")
    batch = renderer.assemble([(samples(1)[0], 0)])
    assert _text(processor, batch.inputs["input_ids"][0].tolist()) == "What does the image describe?"
    assert "What" not in _text(processor, batch.inputs["decoder_input_ids"][0].tolist())


def test_pix2struct_for_questions_draws_the_prompt_above_the_picture(monkeypatch):
    model, processor = tiny_captioner("pix2struct")
    processor.image_processor.is_vqa = True
    seen = {}
    plain = type(processor.image_processor).__call__

    def watch(self, images, **options):
        seen.update(options)
        options.pop("header_text", None)
        self.is_vqa = False
        return plain(self, images, **options)

    monkeypatch.setattr(type(processor.image_processor), "__call__", watch)
    renderer = renderer_of(model, processor, prompt="what is it?")
    batch = renderer.assemble([(sample, 0) for sample in samples(2)])
    assert seen["header_text"] == ["what is it?"] * 2
    assert "what" not in _text(processor, batch.inputs["decoder_input_ids"][0].tolist())


def test_captions_are_drawn_by_seed_and_epoch():
    model, processor = tiny_captioner("bart")
    sample = samples(1)[0]
    one, same, other = (renderer_of(model, processor, seed=seed) for seed in (0, 0, 1))
    drawn = [one.chosen(sample, epoch) for epoch in range(16)]
    assert drawn == [same.chosen(sample, epoch) for epoch in range(16)]
    assert drawn != [other.chosen(sample, epoch) for epoch in range(16)]
    assert {texts[0] for texts in drawn} == set(sample.answers) and all(len(texts) == 1 for texts in drawn)


def test_a_caption_is_cut_before_its_end_token():
    model, processor = tiny_captioner("bart")
    sample = samples(2)[1]
    whole, cut = (renderer_of(model, processor, over_length=way, max_length=8) for way in ("error", "truncate_text"))
    assert whole.length(sample) > 8 and not whole.fits(sample)
    assert cut.length(sample) == whole.length(sample)  # so that it is counted among those that are cut
    labels = cut.assemble([(sample, 0)]).labels[0]
    assert len(labels) == 8 and labels.tolist()[-1] == cut.end


def test_lengths_stay_below_the_decoders_last_position():
    model, processor = tiny_captioner("whisper")
    assert renderer_of(model, processor, max_length=500).max_length == 32


def test_the_preview_row_marks_what_is_said():
    for kind in ("bart", "git", "florence2"):
        model, processor = tiny_captioner(kind)
        row = renderer_of(model, processor, prompt="x").render(samples(1)[0])
        said = row.labels != IGNORED
        assert torch.equal(row.input_ids[said], row.labels[said]) and not said[0]


def test_what_is_no_captioner_is_refused():
    with pytest.raises(BackboneError, match="takes no tokens"):
        caption_shape(transformers.ViTModel, transformers.ViTConfig())
    model, processor = tiny_captioner("bart")
    for half in (processor.tokenizer, processor.image_processor, None):
        with pytest.raises(DataError, match="captions need a tokenizer"):
            CaptionRenderer(half, caption_shape(type(model), model.config), max_length=8)
