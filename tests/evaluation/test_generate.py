"""Generation: the batch a row happens to be in must not change its answer, and nothing is left changed."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from mmft.data.render import Renderer
from mmft.errors import BackboneError
from mmft.evaluation import generate
from mmft.evaluation.generate import generate_answers
from tests.data import small


@pytest.fixture(scope="module")
def processor():
    return small.processor("llava")


def tiny_llava(processor) -> LlavaForConditionalGeneration:
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=192,
            patch_size=32,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).float()
    # Many tokens end an answer, so rows of one batch end at different lengths.
    model.generation_config.eos_token_id = list(range(300, len(tokenizer)))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # What checkpoints of chat models carry: it must not make the answers random.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 0.7
    return model


@pytest.fixture(scope="module")
def samples():
    questions = [
        "What?",
        "Where is the red car in this picture?",
        "How many?",
        "a b c d e f g",
        "Is it a dog or a cat?",
    ]
    return [
        small.sample(questions[index % 5], "an answer", images=index % 3 > 0, seed=index, id=f"row-{index}")
        for index in range(16)
    ]


def answers(model, processor, samples, batch_size: int, **options) -> list[str]:
    renderer = Renderer(processor, max_length=512)
    return generate_answers(
        model, processor, renderer, samples, batch_size=batch_size, max_new_tokens=8, device="cpu", **options
    )


def test_batch_of_one_equals_batch_of_sixteen(processor, samples, monkeypatch):
    model = tiny_llava(processor)
    done: list[int] = []
    one = answers(model, processor, samples, 1, progress=done.append)
    assert sum(done) == len(samples)
    assert len(set(one)) > 3, "the oracle needs answers that differ"
    assert answers(model, processor, samples, 16) == one
    assert answers(model, processor, samples, 5) == one
    monkeypatch.setattr(generate, "_WINDOW_BATCHES", 1)
    assert answers(model, processor, samples, 3) == one
    backwards = answers(model, processor, samples[::-1], 4)
    assert backwards == one[::-1]


def test_answers_equal_the_models_own_greedy_search(processor, samples):
    model = tiny_llava(processor).eval()
    sample = samples[1]
    rendered = Renderer(processor, max_length=512).prompt(sample)
    ids = rendered.input_ids[None]
    for _ in range(8):  # no cache, no generate(): one full forward per token
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **rendered.media).logits
        ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
        if int(ids[0, -1]) in model.generation_config.eos_token_id:
            break
    new = [int(token) for token in ids[0, rendered.input_ids.shape[0] :]]
    new = new[:-1] if new[-1] in model.generation_config.eos_token_id else new
    expected = processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert answers(model, processor, [sample], 1) == [expected]


def test_beams_and_generation_config_stay_out_of_the_model(processor, samples):
    model = tiny_llava(processor)
    before = model.generation_config.to_dict()
    assert answers(model, processor, samples[:4], 4, num_beams=3) == answers(
        model, processor, samples[:4], 1, num_beams=3
    )
    assert model.generation_config.to_dict() == before


def test_training_flags_and_weights_are_as_before(processor, samples):
    model = tiny_llava(processor).train()
    model.model.vision_tower.eval()  # a frozen tower
    flags = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    answers(model, processor, samples[:2], 2)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    class Broken(Renderer):
        def prompt(self, sample):
            raise RuntimeError("no picture")

    with pytest.raises(RuntimeError, match="no picture"):
        generate_answers(
            model, processor, Broken(processor, max_length=512), samples, batch_size=2, max_new_tokens=2, device="cpu"
        )
    assert [module.training for module in model.modules()] == flags


def test_peft_model_answers_with_its_adapter(processor, samples):
    plain = answers(tiny_llava(processor), processor, samples, 8)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    torch.manual_seed(1)
    adapted = get_peft_model(tiny_llava(processor), config).train()
    with_adapter = answers(adapted, processor, samples, 8)
    assert with_adapter != plain
    assert answers(adapted, processor, samples, 3) == with_adapter  # dropout is off
    with adapted.disable_adapter():
        assert answers(adapted, processor, samples, 8) == plain
    merged = adapted.merge_and_unload()
    assert answers(merged, processor, samples, 8) == with_adapter


def test_sixteen_bit_weights_take_the_processors_floats(processor, samples):
    model = tiny_llava(processor).to(torch.bfloat16)
    assert len(answers(model, processor, samples[:3], 3)) == 3


def test_no_rows_no_answers(processor):
    assert answers(tiny_llava(processor), processor, [], 4) == []


def test_layers_that_would_repack_are_refused(processor, samples):
    model = tiny_llava(processor)
    layer = model.model.language_model.layers[0].mlp.up_proj
    layer.support_avx512bf16_for_cpu = True
    with pytest.raises(BackboneError, match="repack") as error:
        answers(model, processor, samples[:1], 1)
    assert "language_model.layers.0.mlp.up_proj" in str(error.value)
    layer.support_avx512bf16_for_cpu = False
    assert len(answers(model, processor, samples[:1], 1)) == 1


def test_a_model_without_a_language_head_is_refused(processor, samples):
    with pytest.raises(BackboneError, match="cannot generate"):
        answers(nn.Linear(2, 2), processor, samples[:1], 1)
