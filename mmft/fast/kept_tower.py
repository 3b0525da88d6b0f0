"""The feature store for rows that reach the model in a batch of their own making (captions, joint and dual learning): a
frozen tower's forward looks a picture up by its pixels.

A picture is opened as without, and encoded once, for all its captions, epochs, terms of a loss and runs. The tower sees
every picture alone, known or not, and its states are kept whole. Price: a hash of the pixels and of the entry, 0.5 ms a
megabyte each. Proof: the loss of real rows stays.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from mmft.adapters.build import set_modes
from mmft.data.captions import CaptionRenderer
from mmft.data.loader import assemble
from mmft.data.pairs import PairRenderer
from mmft.errors import MmftError
from mmft.fast.plan import NotHere, Setting, Work
from mmft.fast.probe import autocast_of
from mmft.fast.slabs import Slabs, cache_folder
from mmft.fast.tower import space_of
from mmft.objectives.contrastive_locked import LockedTower
from mmft.paths import cache_limit

_ROWS = 2


def takes(setting: Setting) -> bool:
    """Whether rows are of this kind; `contrastive` has a memory of its own (`objective.cache_features`)."""
    name = setting.recipe.objective.name
    rows = isinstance(setting.renderer, CaptionRenderer) or type(setting.renderer) is PairRenderer
    return rows and name in ("captioning", "joint", "dual")


def tower_of(setting: Setting) -> tuple[str, nn.Module] | None:
    """Name and module of the one tower that sees pictures."""
    parts, model = setting.adapted.backbone.parts, setting.adapted.backbone.model
    names = [name for name, part in parts.roots.items() if part == "vision"]
    return (names[0], model.get_submodule(names[0])) if len(names) == 1 and names[0] else None


def holds(setting: Setting) -> tuple[bool, str]:
    """Whether what the tower says is a function of the picture alone."""
    found = tower_of(setting)
    if found is None:
        return False, "the model has no tower of pictures that can be told from the rest"
    name, tower = found
    trained = next((own for own, value in tower.named_parameters() if value.requires_grad), None)
    if trained is not None:
        return False, f"vision is trained ({name}.{trained}), so its features change with every step"
    return True, "the tower is frozen, without dropout or augmentation: each picture is opened, and encoded once"


def install(setting: Setting, work: Work) -> Work:
    """The tower's forward with the store before it, after a proof on real rows."""
    set_modes(setting.adapted)
    found = tower_of(setting)
    assert found is not None
    name, tower = found
    active = next(
        (own for own, module in tower.named_modules() if isinstance(module, nn.Dropout) and _acts(module)), None
    )
    if active is not None:
        raise NotHere(f"dropout is active in the tower ({name}.{active})")
    backbone = setting.adapted.backbone
    weights = [(own, value) for own, value in tower.state_dict().items()]
    space = space_of(backbone.model, weights, autocast=setting.recipe.train.bf16)
    plain = _loss(setting, work)
    kept = LockedTower(tower, "image", bound=0, whole=True)
    kept.keep_on(Slabs(cache_folder() / space[:16], limit=cache_limit(), root=cache_folder()), space)
    try:
        cold, warm = _loss(setting, work), _loss(setting, work)
    except (MmftError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        kept.release()
        raise NotHere(f"states cannot be handed over: {type(error).__name__}: {str(error)[:120]}") from error
    apart = float((plain - cold).abs() / plain.abs().clamp(min=1e-6))
    allowed = 5e-2 if setting.recipe.train.bf16 or backbone.model.dtype != torch.float32 else 1e-5
    if not apart <= allowed or not torch.equal(cold, warm) or not kept.hits:
        kept.release()
        told = f"the loss with kept states differs by {apart:.1e}" if kept.hits else "the tower is not called"
        raise NotHere(told)
    return replace(work, undo=(*work.undo, kept.release))


def _acts(module: nn.Dropout) -> bool:
    return bool(module.p) and module.training


def _loss(setting: Setting, work: Work) -> torch.Tensor:
    """The mean loss of a few rows, without gradients."""
    adapted, samples = setting.adapted, setting.samples
    rows = [(samples[place % len(samples)], 0) for place in range(_ROWS)]
    batch = assemble(work.renderer, rows, pad_token_id=0)
    dtype, where = adapted.backbone.model.dtype, next(adapted.model.parameters()).device
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.inputs.items()}
    placed = work.prepare(replace(batch, inputs=inputs).to(where))
    with torch.random.fork_rng(devices=[]), torch.no_grad(), autocast_of(setting):
        torch.manual_seed(0)
        loss = work.objective.loss(adapted.model, placed)
    return loss.sum.detach().float() / max(loss.count, 1)
