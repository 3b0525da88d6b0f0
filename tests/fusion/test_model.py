"""The whole model over tiny random encoders of every kind: masks, missing modalities, saving, parts, training."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from mmft.adapters.build import build_adapters
from mmft.backbones.load import load_backbone
from mmft.backbones.parts import find_parts
from mmft.errors import DataError, RecipeError
from mmft.fusion import FusionConfig, FusionModel, fit_stacking
from mmft.fusion.config import STRATEGIES
from mmft.fusion.heads import loss_of
from mmft.recipe.schema import AdapterSection, ModelSection
from tests.fusion.small import ENCODERS, FOUR, entry, small_config, small_inputs, small_model

ALL = (*FOUR, "table")
LABELS = torch.tensor([0, 1, 2])
CLOSE = {"rtol": 0.0, "atol": 1e-12}  # float64


def row_of(inputs, row):
    return {name: {key: value[row : row + 1] for key, value in held.items()} for name, held in inputs.items()}


def trimmed(inputs):
    """A batch of one row without its padding, by each kind's mask."""
    out = {}
    for name, held in inputs.items():
        length = next((int(held[key].sum()) for key in ("attention_mask", "frame_mask") if key in held), None)
        free = name in ("whisper", "clap", "table", "resnet", "timm", "vit", "dinov2")
        out[name] = held if free or length is None else {key: value[:, :length] for key, value in held.items()}
    return out


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_a_row_alone_and_without_padding_gives_the_same(name):
    model, inputs = small_model((name,), table=False), small_inputs((name,))
    with torch.no_grad():
        whole = model(modalities=inputs).logits
        for row in range(3):
            alone = model(modalities=trimmed(row_of(inputs, row))).logits
            torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-9)  # sdpa picks kernels by shape


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_what_lies_in_the_padding_does_not_matter(name):
    model, inputs = small_model((name,), table=False), small_inputs((name,))
    held = inputs[name]
    key = next((key for key in ("attention_mask", "frame_mask") if key in held), None)
    if key is None or name == "whisper":  # nothing is padded; Whisper hears its padding by design
        return
    content = next(key for key in ("input_ids", "pixel_values", "input_values") if key in held)
    with torch.no_grad():
        before = model(modalities=inputs).logits
        held[content] = held[content].clone()
        held[content][held[key] == 0] = 7
        torch.testing.assert_close(model(modalities=inputs).logits, before, **CLOSE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("training", [False, True])
def test_the_content_of_a_missing_modality_never_matters(strategy, training):
    """In training too, where a batch norm would hear it."""
    model = small_model(strategy=strategy, auxiliary_weight=0.3).train(training)
    first, second = small_inputs(rows=4), small_inputs(rows=4, seed=9)
    present = {"resnet": torch.tensor([True, False, True, True]), "table": torch.tensor([True, True, False, True])}
    present["bert"] = torch.zeros(4, dtype=torch.bool)
    for name, there in present.items():
        for key, value in second[name].items():
            value[there] = first[name][key][there]
    second["hubert"] = first["hubert"]
    labels, outs = torch.tensor([0, 1, 2, 1]), []
    for inputs in (first, second, {name: first[name] for name in ALL if name != "bert"}):
        # Statistics of the batch norms move in training: each forward starts from the same ones.
        fresh = small_model(strategy=strategy, auxiliary_weight=0.3).train(training)
        fresh.load_state_dict(model.state_dict())
        outs.append(fresh(modalities=inputs, present=present, labels=labels))
    for other in outs[1:]:
        assert torch.equal(outs[0].logits, other.logits)
        assert torch.equal(outs[0].loss_sum, other.loss_sum)
    assert torch.isfinite(outs[0].logits).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_without_any_modality_has_an_answer(strategy):
    model, inputs = small_model(strategy=strategy), small_inputs()
    nothing = {name: torch.tensor([True, True, False]) for name in ALL}
    out = model(modalities=inputs, present=nothing, labels=LABELS)
    out.loss.backward()
    assert torch.isfinite(out.logits).all()
    assert (model.missing.vectors.grad.abs().amax(dim=1) > 0).all()
    none = model(modalities={}, present={name: torch.zeros(2, dtype=torch.bool) for name in ALL}).logits
    torch.testing.assert_close(none, out.logits[2].expand(2, -1), **CLOSE)


def test_an_empty_attention_mask_means_missing():
    model, inputs = small_model(), small_inputs()
    expected = model(modalities=inputs, present={"bert": torch.tensor([True, False, True])}).logits
    inputs["bert"]["attention_mask"][1] = 0
    torch.testing.assert_close(model(modalities=inputs).logits, expected, **CLOSE)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("pooling", ["mean", "cls", "attention", "bilstm"])
def test_gradients_flow_to_every_weight(strategy, pooling):
    model = small_model(("bert", "vit"), strategy=strategy, pooling=pooling, auxiliary_weight=0.1).train()
    inputs = small_inputs(("bert", "vit", "table"), rows=6)
    present = {name: torch.tensor([True, True, at != 0, at != 1, at != 2, False]) for at, name in enumerate(inputs)}
    model(modalities=inputs, present=present, labels=torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    # The encoders' own poolers are not used; a key's bias moves no attention weight.
    silent = [
        name
        for name, parameter in model.named_parameters()
        if (parameter.grad is None or not parameter.grad.abs().max() > 0)
        and not any(word in name for word in (".pooler.", "k_proj.bias", "key.bias", "score.2.bias"))
    ]
    assert not silent


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_save_and_load_is_exact_for_every_encoder(name, tmp_path):
    torch.manual_seed(0)
    model = FusionModel(small_config((name,), strategy="early")).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path)
    _same(model, again)
    inputs = _single(small_inputs((name, "table")))
    assert torch.equal(model(modalities=inputs).logits, again(modalities=inputs).logits)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "stacking"])
def test_save_and_load_is_exact_for_every_strategy(strategy, tmp_path):
    torch.manual_seed(0)
    rule = {"strategy": "late", "late_rule": "stacking"} if strategy == "stacking" else {"strategy": strategy}
    config = small_config(pooling="attention", task="ordinal", ordinal_rule="corn", auxiliary_weight=0.1, **rule)
    model = FusionModel(config).eval()
    with torch.no_grad():  # no value may be one that a fresh start has
        for value in (*model.parameters(), *(b for n, b in model.named_buffers() if "stack" in n)):
            value.add_(torch.randn_like(value) * 0.01)
    model.save_pretrained(tmp_path)
    again = FusionModel.from_pretrained(tmp_path)
    _same(model, again)
    inputs = _single(small_inputs())
    # Equal weights at other addresses: a kernel may add in another order where they are not aligned.
    torch.testing.assert_close(model(modalities=inputs).logits, again(modalities=inputs).logits, atol=1e-6, rtol=1e-6)
    one, other = (json.loads(m.config.to_json_string(use_diff=False)) for m in (model, again))
    assert {**one, "_name_or_path": None} == {**other, "_name_or_path": None}


def _single(inputs):
    return {n: {k: v.float() if v.is_floating_point() else v for k, v in held.items()} for n, held in inputs.items()}


def _same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_pretrained_encoders_are_taken_over(tmp_path):
    torch.manual_seed(0)
    kind, config = ENCODERS["bert"]
    bert = transformers.BertForMaskedLM(transformers.AutoConfig.for_model(**config))
    whisper = transformers.WhisperForConditionalGeneration(transformers.AutoConfig.for_model(**ENCODERS["whisper"][1]))
    model = FusionModel.from_encoders(
        FusionConfig(hidden_size=16, num_heads=2, num_layers=1, num_labels=3),
        {"words": ("text", bert), "speech": ("audio", whisper)},
    ).eval()
    inputs = _single(small_inputs(("bert", "whisper")))
    bert.eval()
    tokens, mask = model.encode("words", inputs["bert"])
    expected = bert.bert(**inputs["bert"]).last_hidden_state.masked_fill(~mask.unsqueeze(-1), 0.0)
    assert torch.equal(tokens, expected)
    expected = whisper.eval().model.encoder(inputs["whisper"]["input_features"]).last_hidden_state
    tokens, mask = model.encode("speech", inputs["whisper"])
    assert torch.equal(tokens, expected.masked_fill(~mask.unsqueeze(-1), 0.0))
    model.save_pretrained(tmp_path)
    _same(model, transformers.AutoModel.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "encoders",
    [("bert", "vit", "frames", "wav2vec2", "whisper"), ("bert",), ("timm", "roberta"), ("resnet",), ("clap", "dinov2")],
    ids="+".join,
)
def test_parts_of_a_fusion_model(encoders):
    parts_of_kind = {"text": "language", "image": "vision", "video": "vision", "audio": "audio"}
    model = small_model(encoders, strategy="hybrid")
    parts = find_parts(model)
    present = {parts_of_kind[ENCODERS[name][0]] for name in encoders} | {"projector", "head"}
    assert set(parts.names) == present
    for name, _ in model.named_parameters():
        top, _, rest = name.partition(".")
        if top == "encoders":
            assert parts.part_of(name) == parts_of_kind[ENCODERS[rest.partition(".")[0]][0]], name
        else:
            assert parts.part_of(name) == ("head" if top in ("head", "modality_head") else "projector"), name


def test_lora_in_the_encoders_and_full_training_of_the_fusion(tmp_path):
    FusionModel(small_config(("bert", "vit"))).save_pretrained(tmp_path)
    backbone = load_backbone(ModelSection(name_or_path=str(tmp_path), dtype="float32"))
    assert type(backbone.model) is FusionModel
    assert backbone.processor is None
    section = AdapterSection(
        targets=["language.attention", "vision.attention"], modules_to_save=["projector", "head"], lora_rank=2
    )
    adapted = build_adapters(backbone, section, seed=0)
    model = adapted.model.train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    inputs = _single(small_inputs(("bert", "vit", "table")))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):  # LoRA's A moves only once B has
        optimizer.zero_grad()
        model(modalities=inputs, labels=LABELS).loss.backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved <= trained
    assert any("lora_A" in name and "encoders.vit" in name for name in moved)
    assert any("lora_A" in name and "encoders.bert" in name for name in moved)
    assert any("head" in name for name in moved) and any("strategy" in name for name in moved)


def test_auxiliary_losses_are_those_of_the_rows_that_have_the_modality():
    model, inputs = small_model(auxiliary_weight=0.25, strategy="gated"), small_inputs()
    present = {"hubert": torch.tensor([False, True, True])}
    out = model(modalities=inputs, present=present, labels=LABELS)
    plain = loss_of(model.config, out.logits, LABELS)[0]
    extra = 0.0
    for at, name in enumerate(ALL):
        for row in range(3):
            if name != "hubert" or row > 0:
                extra = extra + torch.nn.functional.cross_entropy(out.modality_logits[row, at], LABELS[row])
    torch.testing.assert_close(out.loss_sum, plain + 0.25 * extra, **CLOSE)
    assert int(out.loss_count) == 3
    torch.testing.assert_close(out.loss, out.loss_sum / 3, **CLOSE)


def test_modality_dropout_is_of_training_only_and_drawn_by_seed():
    model, inputs = small_model(modality_dropout=0.6), small_inputs(rows=6)
    assert model(modalities=inputs).present.all()
    model.train()
    seen = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        seen.append(model(modalities=inputs).present)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    assert all(one.any(dim=1).all() and not one.all() for one in seen)
    # What was dropped is exactly what is missing.
    model, dropped = small_model(modality_dropout=0.6), small_model(modality_dropout=0.6).train()
    for module in dropped.modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.BatchNorm2d):
            module.eval()
    for encoder in dropped.encoders.values():
        encoder.eval()
    torch.manual_seed(5)
    out = dropped(modalities=inputs)
    present = {name: out.present[:, at] for at, name in enumerate(ALL)}
    torch.testing.assert_close(out.logits, model(modalities=inputs, present=present).logits, **CLOSE)


def test_frozen_encoders_stay_in_evaluation_and_can_be_cached():
    model = small_model(strategy="cross_attention")
    model.encoders["resnet"].requires_grad_(False)
    model.train()
    assert not any(module.training for module in model.encoders["resnet"].modules())
    assert model.encoders["bert"].training
    model.eval()
    inputs = small_inputs()
    cached = {name: dict(zip(("features", "mask"), model.encode(name, inputs[name]), strict=True)) for name in FOUR}
    expected = model(modalities=inputs).logits
    found = model(modalities={**cached, "table": inputs["table"]}).logits
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("rule", ["average", "learned"])
def test_late_fusion_by_hand(rule):
    model, inputs = small_model(strategy="late", late_rule=rule), small_inputs()
    if rule == "learned":
        torch.nn.init.normal_(model.modality_head.weights)
    out = model(modalities=inputs, present={"bert": torch.tensor([True, False, True])})
    weights = model.modality_head.weights.exp() if rule == "learned" else torch.ones(4)
    for row in range(3):
        there = [at for at in range(4) if (row, at) != (1, 0)]
        expected = sum(weights[at] * out.modality_logits[row, at] for at in there) / sum(weights[at] for at in there)
        torch.testing.assert_close(out.logits[row], expected, rtol=0, atol=1e-6)  # shares are float32
    assert out.vector is None


def test_hybrid_is_early_fusion_among_the_voices():
    model, inputs = small_model(strategy="hybrid"), small_inputs()
    torch.nn.init.normal_(model.modality_head.weights)
    out = model(modalities=inputs)
    voices = torch.cat((model.head(out.vector).unsqueeze(1), out.modality_logits), dim=1)
    weights = torch.softmax(model.modality_head.weights, dim=0)
    torch.testing.assert_close(out.logits, torch.einsum("m,bmo->bo", weights, voices), rtol=0, atol=1e-6)


def test_stacking_finds_the_modality_that_knows():
    """Of three modalities one is right and two are noise; the optimum equals scikit-learn's logistic regression."""
    linear_model = pytest.importorskip("sklearn.linear_model", reason="extra: test")
    model = small_model(("bert", "vit"), strategy="late", late_rule="stacking")
    late, config = model.modality_head, model.config
    before = late.combine(torch.ones(1, 3, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.bool))
    # Averages until it is fitted; a third is a float32 number there.
    torch.testing.assert_close(before, torch.ones(1, 3, dtype=torch.float64), rtol=0, atol=1e-7)
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (200,), generator=draw)
    outputs = torch.randn(200, 3, 3, generator=draw, dtype=torch.float64)
    outputs[torch.arange(200), 1, labels] += 2.0
    loss = fit_stacking(late, config, outputs, labels=labels, l2=1e-9)
    features = outputs.flatten(1).numpy()
    reference = linear_model.LogisticRegression(C=1e9, tol=1e-10, max_iter=5000).fit(features, labels.numpy())
    chances = torch.tensor(reference.predict_proba(features))
    assert loss == pytest.approx(-chances.log()[torch.arange(200), labels].mean().item(), abs=1e-5)
    found = torch.softmax(late.combine(outputs, torch.ones(200, 3, dtype=torch.bool)), dim=-1)
    torch.testing.assert_close(found, chances, rtol=0, atol=2e-3)  # both solvers stop near the optimum
    with pytest.raises(RecipeError, match="late_rule is average"):
        fit_stacking(small_model(strategy="late").modality_head, config, outputs, labels=labels)


def test_bad_batches_are_named():
    model, inputs = small_model(), small_inputs()
    with pytest.raises(DataError, match="no modality 'berd'[\\s\\S]*nearest: 'bert'"):
        model(modalities={"berd": inputs["bert"]})
    with pytest.raises(DataError, match=r"batch have \[2, 3\] rows"):
        model(
            modalities={
                **inputs,
                "bert": {"input_ids": inputs["bert"]["input_ids"][:2]},
            }
        )
    with pytest.raises(DataError, match="rows have 'bert' but the batch does not"):
        model(modalities={"table": inputs["table"]}, present={"bert": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(DataError, match="too short for one frame[\\s\\S]*at least 10 samples"):
        model(modalities={"hubert": {"input_values": torch.zeros(1, 9, dtype=torch.float64)}})
    with pytest.raises(DataError, match="a text encoder got pixel_values"):
        model(modalities={"bert": inputs["resnet"]})
    with pytest.raises(RecipeError, match="model type 'berd'"):
        FusionModel(FusionConfig(encoders=[{**entry("bert"), "config": {"model_type": "berd"}}]))
    with pytest.raises(RecipeError, match="at least one modality"):
        FusionModel(FusionConfig())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_learns(strategy):
    """What only two modalities together tell: the table's site and the first word of the text."""
    torch.manual_seed(0)
    model = FusionModel(small_config(("bert",), strategy=strategy, labels=2, modality_dropout=0.05)).train()
    draw = torch.Generator().manual_seed(0)
    words, sites = (torch.randint(0, 2, (64,), generator=draw) for _ in range(2))
    inputs = {
        "bert": {"input_ids": torch.stack((words + 5, torch.full((64,), 3)), 1), "attention_mask": torch.ones(64, 2)},
        "table": {
            "numeric": torch.zeros(64, 2),
            "missing": torch.zeros(64, 2, dtype=torch.bool),
            "categories": sites[:, None] + 2,
        },
    }
    labels = words & sites  # late fusion cannot say "either, not both"; it can say "both"
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(modalities=inputs, labels=labels).loss.backward()
        optimizer.step()
    found = model.eval()(modalities=inputs).logits.argmax(dim=-1)
    assert (found == labels).float().mean() > 0.95
