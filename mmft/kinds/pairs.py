"""Runs on pairs of a picture and its texts: a dual encoder is trained and scored by retrieval."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from mmft.adapters.build import PREFIX, Adapted, ParamGroup, set_modes
from mmft.adapters.folder import WEIGHTS
from mmft.backbones.load import Backbone, load_backbone
from mmft.data.loader import RowRenderer, near
from mmft.data.pair_preview import write_pair_preview
from mmft.data.pairs import PairRenderer, merge_pairs, with_group
from mmft.data.sample import Sample
from mmft.engine.callbacks import Callback
from mmft.engine.memory import estimate_memory
from mmft.errors import ExportError
from mmft.evaluation.pairs import embed_pairs, largest_difference
from mmft.fast.slabs import Slabs, cache_folder
from mmft.fast.tower import space_of
from mmft.files import write_json
from mmft.kinds.base import Datasets, Kind, folder_section
from mmft.kinds.forgetting import RESULT as PROBE
from mmft.kinds.forgetting import guards
from mmft.kinds.pairs_scores import evaluate_pairs
from mmft.objectives.base import Objective
from mmft.objectives.contrastive import ContrastiveObjective
from mmft.objectives.contrastive_embed import scales
from mmft.objectives.contrastive_locked import LockedTower, check_locked, lock_towers
from mmft.paths import cache_limit
from mmft.recipe.schema import Recipe
from mmft.runfolder import RunFolder, read_json

RESULT = "retrieval.json"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""What a component of a vector of length one may be off by in a merged model: its type's rounding through the tower."""


class Pairs(Kind):
    """`contrastive`: pictures and texts of a dual encoder."""

    objectives: ClassVar[tuple[str, ...]] = ("contrastive",)
    formats = ("pairs",)
    rows_wanted = "pairs (image and caption) for contrastive and captioning; messages, llava or qa for sft"
    least_rows = 2

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`PairRenderer`."""
        return PairRenderer(
            processor,
            max_length=recipe.data.max_length,
            over_length=recipe.data.over_length,
            max_image_pixels=recipe.data.max_image_pixels,
            captions=recipe.objective.captions_per_image,
            seed=recipe.train.seed,
        )

    def samples(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """Rows of one picture become one."""
        return merge_pairs(samples)

    def streamed(self, recipe: Recipe, rows: Callable[[int], Sample], number: int, count: int) -> Sample:
        """Rows of one picture stay apart, as right for each other's texts."""
        return with_group(rows(number))

    def adapt(self, adapted: Adapted, recipe: Recipe) -> Adapted:
        """The scale and bias of the similarities trained too, where the recipe asks for it."""
        return free_scales(adapted) if recipe.objective.train_logit_scale else adapted

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """InfoNCE or the sigmoid loss over whole optimizer steps; frozen towers remember their features if asked to."""
        objective = ContrastiveObjective(adapted.model, kind=recipe.objective.loss)
        if recipe.objective.cache_features:
            remember(adapted, datasets, recipe)
        return objective

    def watchers(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[Callback]:
        """The guard against forgetting, where the recipe names a probe set."""
        return [*guards(run, adapted.model, datasets)]

    def keep(self, recipe: Recipe, adapted: Adapted, folder: Path) -> None:
        """The trained scale and bias."""
        keep_scales(adapted, folder)

    def compare(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> dict[str, Any]:
        """The embeddings of a few rows."""
        chosen = datasets.shown(run.recipe.export.verify_rows)
        assert isinstance(datasets.renderer, PairRenderer)
        return {"embeddings": compare_embeddings(run, adapted, chosen, datasets.renderer)}

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Retrieval of every model on every set, written to `retrieval.json`."""
        write_json(run.path / RESULT, evaluate_pairs(run, adapted, datasets, self.base(run.recipe, run.path)))

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """What `evaluate` wrote (empty before that), and what the guard against forgetting saw."""
        probe = read_json(run.path / PROBE)
        return read_json(run.path / RESULT) | ({"probe": probe} if probe else {})

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """Tokens of each row's longest text."""
        return {"all": [renderer.length(sample) for sample in samples]}

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """Activations of the text tower and of a tower of patches in one forward (None for another tower, such as a
        convolutional one), and the step's similarities: both directions with their gradients in float32."""
        config, micro = backbone.model.config, recipe.train.per_device_train_batch_size
        seen: Any = getattr(config, "vision_config", None)
        size, patch = (getattr(seen, name, None) for name in ("image_size", "patch_size"))
        if not isinstance(size, int) or not isinstance(patch, int):
            return None
        texts = micro * max(recipe.objective.captions_per_image, 1)
        longest = max(lengths["all"]) if lengths else 64
        activations = 0
        for tower, tokens in ((config.text_config, texts * longest), (seen, micro * ((size // patch) ** 2 + 1))):
            estimate = estimate_memory(
                weight_bytes=0,
                trainable_parameters=trainable,
                tokens=tokens,
                supervised=0,
                hidden=tower.hidden_size,
                intermediate=getattr(tower, "intermediate_size", 4 * tower.hidden_size),
                layers=tower.num_hidden_layers,
                vocabulary=0,
                checkpointing=False,
            )
            activations += estimate.activations
        rows = recipe.train.effective_batch_size or micro * recipe.train.gradient_accumulation_steps
        matrix = 4 * rows * rows * max(recipe.objective.captions_per_image, 1)
        return {"activations": int(activations), "logits": 4 * matrix}

    def preview(self, recipe: Recipe, processor: Any, samples: Sequence[Sample], path: Path, *, rows: int) -> None:
        """Each picture as the model gets it, its texts with their tokens, and its hard negatives."""
        renderer = self.renderer(recipe, processor)
        assert isinstance(renderer, PairRenderer)
        write_pair_preview(samples, renderer, path, rows=rows)


def remember(adapted: Adapted, datasets: Datasets, recipe: Recipe) -> list[LockedTower]:
    """Lock the towers on which nothing is trained, and check on a row that this changes nothing. What they say is kept
    in the feature store too, but of pictures that the recipe changes from epoch to epoch.

    Raises RecipeError when every tower is trained.
    """
    set_modes(adapted)
    towers = lock_towers(adapted.model)
    for tower in towers:
        if tower.side == "text" or not recipe.data.augmentation:
            weights = list(tower.tower.state_dict().items())
            space = space_of(adapted.backbone.model, weights, autocast=recipe.train.bf16)
            tower.keep_on(Slabs(cache_folder() / space[:16], limit=cache_limit(), root=cache_folder()), space)
    renderer, (sample,) = datasets.renderer, near(datasets.train, 1, datasets.renderer)
    assert isinstance(renderer, PairRenderer)
    first, dtype = next(adapted.model.parameters()), adapted.backbone.model.dtype
    one = {**renderer.encode_media([sample]), **renderer.encode_texts(sample.answers[:1])}
    inputs = {
        key: (value.to(dtype) if value.is_floating_point() else value).to(first.device) for key, value in one.items()
    }
    for tower in towers:
        check_locked(adapted.model, tower, inputs)
    return towers


def free_scales(adapted: Adapted) -> Adapted:
    """The adapted model with the scale and bias of its similarities trained too."""
    learned = scales(adapted.model)
    for value in learned.values():
        value.requires_grad_(True)
    known = {name for group in adapted.groups for name in group.names}
    names = tuple(name for name, value in adapted.trainable().items() if name not in known)
    if not names:
        return adapted
    return dataclasses.replace(adapted, groups=(*adapted.groups, ParamGroup(adapted.home(names[0])[0], names, None)))


def keep_scales(adapted: Adapted, folder: Path) -> None:
    """Put the trained scale and bias into the adapter's weights, where plain peft and the merge find them: under the
    names of the base's own parameters."""
    learned = {name: value for name, value in scales(adapted.model).items() if value.requires_grad}
    path = folder / WEIGHTS
    if not learned or not path.is_file():
        return
    mode = path.stat().st_mode & 0o777
    tensors = load_file(path) | {PREFIX + name: value.detach().cpu().float().clone() for name, value in learned.items()}
    save_file(dict(sorted(tensors.items())), path, metadata={"format": "pt"})
    path.chmod(mode)


def compare_embeddings(
    run: RunFolder, adapted: Adapted, samples: Sequence[Sample], renderer: PairRenderer
) -> dict[str, Any]:
    """The merged folder's embeddings against the adapter model's, on a few rows.

    Raises ExportError when they differ by more than the weights' type rounds (checked unless the base is quantized and
    the merge was onto the original weights).
    """
    if not samples:
        return {}
    recipe = run.recipe
    ours = embed_pairs(adapted.model, renderer, samples, batch_size=len(samples))
    other = load_backbone(folder_section(recipe.model, run.merged), device=next(adapted.model.parameters()).device)
    theirs = embed_pairs(other.model, renderer, samples, batch_size=len(samples))
    found = largest_difference(ours, theirs)
    limit = max(LIMITS[kind] for kind in {other.model.dtype, getattr(torch, recipe.export.dtype or "float32")})
    limit = LIMITS[torch.bfloat16] if adapted.backbone.quantized else limit
    checked = not adapted.backbone.quantized or recipe.export.merge_onto == "dequantized"
    del other
    gc.collect()
    if checked and not found <= limit:
        raise ExportError(
            f"the merged model's embeddings differ from the adapter model's by {found:.3g} (allowed {limit:g})",
            where=str(run.merged),
            do="look at merge_report.json",
        )
    return {"rows": len(samples), "max_difference": found, "limit": limit, "checked": checked}
