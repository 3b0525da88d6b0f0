"""Features of frozen towers, computed once for each picture and kept on disk for all steps, epochs, ranks and runs.

    key   = sha256(bytes of the row's pictures, tower and projector weights, config, processor, precision, kernels)
    value = what `get_image_features` says of these pictures, and how they stand in the text

A batch reaches the model with `mm_encoder_outputs={"image": ...}` (transformers' own way in) instead of pixels; a row
whose features are known is rendered without opening its pictures. What is missing is computed by the step that needs
it and kept then and there: nothing is computed twice, nothing is waited for. Answers to one prompt, the reference
beside the policy, and sampling beside learning show the tower the same picture; they are given one answer of it.

The tower always sees the pictures of one row alone, known or not. Its answer in bf16 may depend on what else lies in
its batch, and a run that is killed and resumed must be the same byte for byte whoever filled the store and how full it
was. Price: a tower forward a row instead of a micro-batch, 0.9 to 1.0 times the time of the batch on a CPU (CLIP
ViT-S/16 at 224, SigLIP-B/16 at 512), where the batch does not fit into the caches; 1.2 (batch 4) to 1.4 times (batch
16) for a small convolutional tower at 192, and on a device with room for a batch it costs the first epoch something.
Storing takes 0.2 ms a picture of 220 KB, reading as much. Disk: tokens * hidden * 2 bytes a picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mmft.adapters.build import set_modes
from mmft.data.collate import Batch, collate
from mmft.data.preference_render import PreferenceBatch
from mmft.data.render import Rendered, Renderer
from mmft.data.sample import MediaRef, Sample
from mmft.errors import MmftError
from mmft.fast import kept_tower
from mmft.fast.plan import Candidate, NotHere, Setting, Work
from mmft.fast.slabs import Slabs, cache_folder
from mmft.fast.stored import FEATURES, StoredRenderer, chat_of, rendered, with_chat
from mmft.fast.tower import FROZEN, Tower
from mmft.objectives.build import output_head
from mmft.objectives.sft import head_on_rows
from mmft.paths import cache_limit
from mmft.recipe.methods import METHODS

AnyBatch = TypeVar("AnyBatch", bound=Batch)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative difference of logits between a row alone and in a batch; 5e-2 in 16 bits."""


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether features can stand in for pixels here, from structure alone."""
    recipe, model = setting.recipe, setting.adapted.backbone.model
    if chat_of(setting.renderer) is None and recipe.objective.cache_features:
        return False, "objective.cache_features keeps what frozen towers say, in the same store"
    by_pixels = kept_tower.takes(setting)
    if chat_of(setting.renderer) is None and not by_pixels:
        return False, f"rows of {recipe.objective.name} reach the model by a way of their own"
    if setting.samples and not any(map(_shown, setting.samples)):
        return False, "no row has a picture"
    every = (media for sample in (*setting.samples, *setting.evals) for media in _shown(sample))
    other = next((ref.kind for media in every for ref in media if ref.kind != "image"), None)
    if other is not None:
        return False, f"a row holds {other}, and only features of pictures are kept"
    if recipe.data.augmentation:
        return False, "data.augmentation changes the pictures from epoch to epoch"
    if by_pixels:
        return kept_tower.holds(setting)
    takes = "mm_encoder_outputs" in inspect.signature(type(model).forward).parameters and hasattr(
        model, "get_image_features"
    )
    if not takes:
        return False, f"the forward of {type(model).__name__} takes no features (mm_encoder_outputs)"
    trained = [name for name in setting.adapted.trainable() if setting.adapted.home(name)[0] in FROZEN]
    if trained:
        part = setting.adapted.home(trained[0])[0]
        return False, f"{part} is trained ({trained[0]}), so its features change with every step"
    if METHODS[setting.adapted.method].place == "prompt":
        return False, f"the forward of {setting.adapted.method} tuning passes inputs on in its own way"
    if recipe.data.over_length == "shrink_images":
        return False, "data.over_length: shrink_images makes a picture's size depend on its question"
    return True, "tower and projector are frozen, without dropout or augmentation"


def _shown(sample: Sample) -> set[tuple[MediaRef, ...]]:
    """The pictures of each conversation of a row, those that differ: answers to one prompt may have their own."""
    own = {sample.media if one.media is None else one.media for one in sample.candidates} or {sample.media}
    return own - {()}


def saves(setting: Setting) -> str:
    """How many pictures this run sees again, and the share of weights that they pass."""
    backbone = setting.adapted.backbone
    sizes = [
        (value.numel(), backbone.parts.part_of(name) in FROZEN) for name, value in backbone.model.named_parameters()
    ]
    share = sum(size for size, frozen in sizes if frozen) / max(sum(size for size, _ in sizes), 1)
    shown = [media for sample in setting.samples for media in _shown(sample)]
    train = setting.recipe.train
    seen = len(shown) * (train.num_train_epochs if train.max_steps is None else 1)
    again = 1 - len(set(shown)) / seen if seen else 0.0
    what = "encoding" if kept_tower.takes(setting) else "opening and encoding"
    told = f"{what} a picture seen before ({share:.0%} of the weights)"
    alone = isinstance(setting.renderer, Renderer) or kept_tower.takes(setting)
    also = "" if alone else "; answers, samplings and the reference share one encoding"
    return f"{told}; {max(again, 0.0):.0%} of this run's are, and all of a later run's{also}"


def install(setting: Setting, work: Work) -> Work:
    """The renderer that looks into the store and the function that puts features into a batch, after a proof on one
    row: logits with features equal those with pixels bit for bit."""
    renderer = chat_of(work.renderer)
    if renderer is None:
        return kept_tower.install(setting, work)
    set_modes(setting.adapted)
    _refuse_dropout(setting)
    tower = Tower(setting.adapted, autocast=setting.recipe.train.bf16)
    space = tower.digest(renderer.processor)
    slabs = Slabs(cache_folder() / space[:16], limit=cache_limit(), root=cache_folder())
    stored = StoredRenderer(renderer, slabs, space=space, takes=tower.takes, dtype=tower.model.dtype)
    _prove(setting, work, stored, tower)
    stored.opened = 0
    return replace(work, renderer=with_chat(work.renderer, stored), prepare=Filled(tower, slabs, work.prepare))


class Filled:
    """Puts features into a batch: known ones, and those that it has computed and stored. `hits` and `misses` count."""

    def __init__(self, tower: Tower, slabs: Slabs, inner: Any) -> None:
        self.tower, self.slabs, self.inner = tower, slabs, inner
        self.hits = self.misses = 0

    def __call__(self, batch: Batch) -> Batch:
        """The batch with `mm_encoder_outputs` in the place of its pictures."""
        batch = self.inner(batch)
        if isinstance(batch, PreferenceBatch) and batch.altered is not None:
            batch = replace(batch, altered=self._filled(batch.altered))
        return self._filled(batch)

    def _filled(self, batch: AnyBatch) -> AnyBatch:
        if not batch.pictures:
            return batch
        here: dict[str | int, Mapping[str, Tensor]] = {}
        rows = []
        for one in batch.pictures:
            name = one.key or id(one)
            known = one.known or here.get(name) or (self.slabs.get(one.key) if one.key else None)
            self.hits, self.misses = self.hits + bool(known), self.misses + (not known)
            if not known:
                answer = {f"{FEATURES}{name}": value for name, value in self.tower(one.inputs).items()}
                here[name] = known = {**one.record, **answer}
                if one.key:
                    self.slabs.put(one.key, known)
            if one.inputs:
                one.answer(known)
            rows.append({n.removeprefix(FEATURES): value for n, value in known.items() if n.startswith(FEATURES)})
        return replace(batch, inputs={**batch.inputs, "mm_encoder_outputs": {"image": self.tower.joined(rows)}})


def _refuse_dropout(setting: Setting) -> None:
    for name, module in setting.adapted.backbone.model.named_modules():
        active = isinstance(module, nn.Dropout) and module.p and module.training
        if active and setting.adapted.backbone.parts.part_of(name) in FROZEN:
            raise NotHere(f"dropout is active in the tower ({name})")


def _prove(setting: Setting, work: Work, stored: StoredRenderer, tower: Tower) -> None:
    """Raise NotHere unless one row's logits are the same with features, and nearly the same in a batch of two."""
    sample, chat = next(filter(_shown, setting.samples), None), chat_of(work.renderer)
    if sample is None or chat is None:
        raise NotHere("no row has a picture")
    try:
        plain = rendered(work.renderer, chat, sample)
        stored.slabs, kept = _Nothing(stored.slabs), stored.slabs  # type: ignore[assignment]
        row = rendered(work.renderer, stored, sample)
        stored.slabs = kept
        pixels = _last_logits(setting, [plain], {})
        assert row.pictures is not None
        features = tower(row.pictures.inputs)
        one = _last_logits(setting, [row], {"image": tower.joined([features])})
        two = _last_logits(setting, [row, row], {"image": tower.joined([features, features])})
    except (MmftError, ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise NotHere(f"features cannot be handed over: {type(error).__name__}: {str(error)[:120]}") from error
    if not torch.equal(pixels, one):
        apart = float((pixels - one).abs().max())
        raise NotHere(f"logits with features differ from those with pixels by {apart:.1e}")
    allowed = 5e-2 if setting.recipe.train.bf16 else TOLERANCE.get(pixels.dtype, 5e-2)
    apart = float((two - one).abs().max() / one.abs().max().clamp(min=1e-6))
    if not apart <= allowed:
        raise NotHere(f"two rows of features in a batch differ from one by {apart:.1e}")


class _Nothing:
    """A store without entries, for the proof."""

    def __init__(self, inner: Slabs) -> None:
        self.inner = inner

    def get(self, key: str) -> None:
        """Nothing."""
        return None


def _last_logits(setting: Setting, rows: list[Rendered], features: dict[str, Any]) -> Tensor:
    """(rows, vocabulary) at the last position, without gradients, as training computes them."""
    adapted = setting.adapted
    where = next(adapted.model.parameters()).device
    batch = collate([replace(row, pictures=None) for row in rows], pad_token_id=adapted.backbone.pad_token_id).to(where)
    dtype = adapted.backbone.model.dtype
    inputs = {name: v.to(dtype) if v.is_floating_point() else v for name, v in batch.inputs.items()}
    if features:
        inputs["mm_encoder_outputs"] = features
    last = torch.zeros_like(batch.labels, dtype=torch.bool)
    last[:, -1] = True
    head = output_head(adapted.model, where="train.fast")
    autocast = torch.autocast(where.type, dtype=torch.bfloat16, enabled=setting.recipe.train.bf16)
    training = adapted.model.training
    adapted.model.eval()
    try:
        with torch.no_grad(), autocast, head_on_rows(head, last):
            logits = adapted.model(**inputs, use_cache=False).logits
    finally:
        adapted.model.train(training)
        set_modes(adapted)
    return logits.reshape(len(rows), -1).float()


CANDIDATE = Candidate("feature_store", holds, saves, install)
