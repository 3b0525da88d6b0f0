"""Captions by greedy, beam and nucleus search: transformers' own answers, and draws that belong to their rows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmft.evaluation.captions import generate_captions
from mmft.evaluation.sampling import NucleusDraws, Sampling, nucleus
from tests.objectives.captioners import PICTURES, SOUNDS, renderer_of, samples, tiny_captioner

KINDS = (*PICTURES, *SOUNDS)


def _own(model, renderer, processor, rows, **options):
    """transformers' own generation, row by row, decoded."""
    texts = []
    for sample in rows:
        inputs, begin = renderer.prompts([sample])
        if model.config.model_type == "blip":
            inputs = {"pixel_values": inputs["pixel_values"]}  # without a prompt it begins by itself
        else:
            options["pad_token_id"] = 0
        found = model.generate(**inputs, do_sample=False, max_length=None, **options)[0].tolist()
        found = found[len(begin) :] if found[: len(begin)] == begin else found  # Whisper gives the new tokens alone
        cut = found.index(2) if 2 in found else len(found)
        texts.append(processor.tokenizer.decode(found[:cut], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beams", [1, 3])
def test_captions_are_those_of_transformers_own_generate(kind, beams):
    model, processor = tiny_captioner(kind)
    renderer, rows = renderer_of(model, processor), samples(5, sound=kind in SOUNDS)
    ours = generate_captions(model, renderer, rows, batch_size=2, max_new_tokens=6, num_beams=beams)
    assert ours == _own(model, renderer, processor, rows, max_new_tokens=6, num_beams=beams)
    assert any(ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_read_and_is_no_part_of_the_answer(kind):
    model, processor = tiny_captioner(kind)
    rows = samples(3, sound=kind in SOUNDS)
    plain, led = (
        generate_captions(model, renderer_of(model, processor, prompt=prompt), rows, batch_size=3, max_new_tokens=5)
        for prompt in ("", "it is")
    )
    assert not any(text.startswith("it is") for text in led)
    if kind != "pix2struct":  # only those for questions draw it above the picture
        assert plain != led


def test_the_nucleus_is_the_smallest_set_with_the_mass():
    scores = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.05, 0.05, 0.1, 0.8]]).log()
    assert nucleus(scores, 0.6).tolist() == [[True, True, False, False], [False, False, False, True]]
    assert nucleus(scores, 1.0).all()
    assert nucleus(scores, 0.0).sum(-1).tolist() == [1, 1]


def test_draws_follow_the_probabilities_of_the_nucleus():
    scores = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().repeat(4000, 1)
    draws = NucleusDraws(Sampling(top_p=0.85, seed=3), [str(row) for row in range(4000)])
    counted = Counter(draws(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1).tolist())
    assert set(counted) == {0, 1, 2}
    for token, share in ((0, 0.5 / 0.9), (1, 0.25 / 0.9), (2, 0.15 / 0.9)):
        assert counted[token] / 4000 == pytest.approx(share, abs=0.03)


def test_temperature_sharpens_the_draws():
    scores = torch.tensor([[0.6, 0.4]]).log().repeat(2000, 1)
    rows = [str(row) for row in range(2000)]
    found = NucleusDraws(Sampling(temperature=0.5), rows)(torch.zeros(2000, 1, dtype=torch.long), scores)
    assert (found.argmax(-1) == 0).float().mean().item() == pytest.approx(0.36 / 0.52, abs=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_depend_on_the_seed_and_not_on_the_batch(kind):
    model, processor = tiny_captioner(kind)
    renderer, rows = renderer_of(model, processor), samples(5, sound=kind in SOUNDS)

    def drawn(seed, size, chosen=rows):
        sampling = Sampling(top_p=0.9, seed=seed)
        return generate_captions(model, renderer, chosen, batch_size=size, max_new_tokens=6, sampling=sampling)

    first = drawn(0, 2)
    assert first == drawn(0, 5) == drawn(0, 2)
    assert drawn(0, 3, rows[::-1]) == first[::-1]
    assert drawn(1, 2) != first


def test_a_peft_model_captions_and_keeps_its_modes():
    model, processor = tiny_captioner("bart")
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.train()
    model.encoder.eval()
    before = [module.training for module in wrapped.modules()]
    tuned = generate_captions(wrapped, renderer_of(model, processor), samples(4), batch_size=4, max_new_tokens=6)
    assert before == [module.training for module in wrapped.modules()]
    with wrapped.disable_adapter():
        base = generate_captions(wrapped, renderer_of(model, processor), samples(4), batch_size=4, max_new_tokens=6)
    assert tuned != base
