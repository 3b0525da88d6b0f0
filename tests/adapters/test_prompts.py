"""Prompts and prefixes against the same tokens written out: positions, masks and pictures are where they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmft.adapters.build import Adapted, build_adapters
from mmft.backbones.load import Backbone
from mmft.backbones.parts import find_parts
from mmft.errors import AdapterError
from mmft.recipe.schema import AdapterSection
from tests.tiny import tiny_inputs, tiny_vlm

TOKENS = torch.tensor([20, 21, 22, 23])


def build(kind: str, method: str) -> Adapted:
    model = tiny_vlm(kind)[0]
    base = Backbone(model, None, find_parts(model), None, kind, None, False)
    return build_adapters(base, AdapterSection.model_validate({"method": method, "num_virtual_tokens": 4}), seed=0)


def written_out(kind: str) -> dict[str, Any]:
    """The inputs with the four tokens in front."""
    inputs = tiny_inputs(kind, batch=2)
    inputs["input_ids"] = torch.cat((TOKENS.expand(2, -1), inputs["input_ids"]), 1)
    inputs["attention_mask"] = torch.cat((torch.ones(2, 4, dtype=torch.long), inputs["attention_mask"]), 1)
    return inputs


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_a_prompt_of_real_tokens_is_those_tokens(kind: str) -> None:
    adapted = build(kind, "prompt")
    with torch.no_grad():
        model = tiny_vlm(kind)[0]
        wanted = model(**written_out(kind)).logits
        adapted.model.prompt_encoder["default"].embedding.weight.copy_(model.get_input_embeddings()(TOKENS))
        found = adapted.model.eval()(**tiny_inputs(kind, batch=2)).logits
    assert torch.equal(found, wanted)
    assert adapted.table() == [["language", "embedding", "prompt", "1", "256"]]


@pytest.mark.parametrize("kind", ["llava", "smolvlm"])
def test_a_prefix_of_real_keys_and_values_is_those_tokens(kind: str) -> None:
    adapted = build(kind, "prefix")
    with torch.no_grad():
        model = tiny_vlm(kind)[0]
        wanted = model(**written_out(kind)).logits[:, 4:]
        cache = model(input_ids=TOKENS[None], attention_mask=torch.ones(1, 4, dtype=torch.long)).past_key_values
        pairs = [side[0].permute(1, 0, 2) for layer in cache.layers for side in (layer.keys, layer.values)]
        weight = adapted.model.prompt_encoder["default"].embedding.weight
        weight.copy_(torch.stack(pairs, 1).reshape(4, -1))
        found = adapted.model.eval()(**tiny_inputs(kind, batch=2)).logits
    assert torch.allclose(found, wanted, atol=1e-5)  # keys are summed in another order


def test_answers_can_be_generated() -> None:
    for method in ("prompt", "prefix"):
        model = build("llava", method).model.eval()
        inputs = tiny_inputs("llava", answer=None, batch=2)
        out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert out.shape[0] == 2 and torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
        with model.disable_adapter(), torch.no_grad():
            plain = tiny_vlm("llava")[0](**tiny_inputs("llava")).logits
            assert torch.equal(model(**tiny_inputs("llava")).logits, plain)


def test_the_start_is_the_seed_s_and_holds_no_special_token() -> None:
    one, two = (build("smolvlm", "prompt") for _ in range(2))
    rows = one.model.prompt_encoder["default"].embedding.weight
    assert torch.equal(rows, two.model.prompt_encoder["default"].embedding.weight)
    config = one.backbone.model.config
    image = one.backbone.model.get_input_embeddings().weight[config.image_token_id]
    assert not (rows == image).all(-1).any()


@pytest.mark.parametrize("kind", ["qwen2_vl", "mllama"])
@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_models_that_lose_their_positions_are_refused(kind: str, method: str) -> None:
    with pytest.raises(AdapterError, match=f"{method} tuning does not work on"):
        build(kind, method)
