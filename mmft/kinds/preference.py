"""Runs on preferences: pairs of answers or thumbs; answers by generation, judged by the true one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mmft.adapters.build import Adapted
from mmft.adapters.store import adapter_digest
from mmft.backbones.fingerprint import fingerprint
from mmft.backbones.load import Backbone
from mmft.data.audit import fingerprint as digest_of_rows
from mmft.data.collate import collate
from mmft.data.loader import RowRenderer, near
from mmft.data.order import StepPlan
from mmft.data.preference import PREFERENCE, as_pairs, as_thumbs
from mmft.data.preference_render import PreferenceBatch, PreferenceRenderer, with_answer
from mmft.data.sample import Candidate, Sample
from mmft.data.streaming import Streamed
from mmft.errors import DataError
from mmft.evaluation.answers import PredictionStore
from mmft.evaluation.generate import generate_answers
from mmft.evaluation.preference import answer_values, score_preferences
from mmft.files import write_json
from mmft.kinds.base import Datasets, Kind, models
from mmft.kinds.chat import Chat, make_renderer
from mmft.objectives.base import Objective
from mmft.objectives.build import output_head, virtual_tokens
from mmft.objectives.preference import WITHOUT_REFERENCE, PreferenceObjective, Settings
from mmft.objectives.preference_forward import CHECKED, answer_logps, share_where_exact
from mmft.objectives.reference import AdapterOff, Kept, Run, make_table, placed, table_path
from mmft.recipe.schema import ObjectiveSection, Recipe
from mmft.runfolder import RunFolder, read_json, versions

LIKELIER = "preferences.json"
_BEHIND = 256
"""Rows of a stream that are looked through for an answer that reads otherwise."""
CONVERSATIONS = ("messages", "llava", "qa")


def preference_renderer(datasets: Datasets) -> PreferenceRenderer:
    """The renderer of a run on preferences."""
    assert isinstance(datasets.renderer, PreferenceRenderer)
    return datasets.renderer


def answers_renderer(recipe: Recipe, processor: Any) -> PreferenceRenderer:
    """Renders the answers that a recipe compares, each with loss on itself alone."""
    chat = make_renderer(recipe, processor, supervise="last_answer")
    section = recipe.objective
    altered = section.rejected_image if section.name == "dpo" and section.image_weight else None
    return PreferenceRenderer(chat, altered=altered, seed=recipe.train.seed)


def require_candidates(samples: Sequence[Sample], recipe: Recipe, *, what: str) -> None:
    """Raise DataError when a row that is learned from holds no preference."""
    bad = next((sample for sample in samples if not sample.candidates), None)
    if bad is not None:
        raise DataError(
            f"{what} holds rows without preferences, and objective.name is {recipe.objective.name}",
            where=bad.where or bad.id,
            allowed="chosen and rejected; answers with scores; completion and label",
            do="put conversations behind the first set of data.eval; there they are answered and scored",
        )


class Preference(Kind):
    """`dpo`, `kto`, `orpo`, `simpo`, `cpo`. Evaluation sets may hold conversations too, from the second on."""

    objectives = ("dpo", "kto", "orpo", "simpo", "cpo")
    formats = (PREFERENCE, *CONVERSATIONS)
    rows_wanted = "preferences (chosen and rejected, ranked answers, thumbs); conversations in data.eval"

    def renderer(self, recipe: Recipe, processor: Any) -> RowRenderer:
        """`answers_renderer`."""
        return answers_renderer(recipe, processor)

    def samples(self, recipe: Recipe, samples: list[Sample]) -> list[Sample]:
        """Pairs of answers; for `kto` thumbs, each with another row's answer for the estimate of the KL."""
        plain = [sample for sample in samples if not sample.candidates]
        if recipe.objective.name == "kto":
            thumbs = [one for sample in samples if sample.candidates for one in as_thumbs(sample)]
            return plain + mismatched(thumbs)
        rows = [sample for sample in samples if sample.candidates]
        alone = next((sample for sample in rows if len(sample.candidates) < 2), None)
        if alone is not None:
            raise DataError(
                f"the row has one answer with a thumb, and objective.name is {recipe.objective.name}",
                where=alone.where or alone.id,
                allowed="two answers or more",
                do="set objective.name: kto",
            )
        return plain + [pair for sample in rows for pair in as_pairs(sample)]

    def streamed(self, recipe: Recipe, rows: Callable[[int], Sample], number: int, count: int) -> Sample:
        """A pair, or for `kto` a thumb; with another row's answer, the next one of the set that reads otherwise."""
        sample = rows(number)
        require_candidates([sample], recipe, what="data.train")
        if recipe.objective.name != "kto":
            return only_one(sample, as_pairs(sample), "pair", "`chosen` and `rejected`")
        thumb = only_one(sample, as_thumbs(sample), "thumb", "`completion` and `label`")
        return with_other(thumb, _texts_behind(rows, number, count))

    def objective(self, recipe: Recipe, adapted: Adapted, datasets: Datasets) -> Objective:
        """The losses of `mmft/objectives/preference_losses.py`; the prompt is shared where that is exact."""
        section, renderer = recipe.objective, preference_renderer(datasets)
        if not isinstance(datasets.train, Streamed):  # there each row is looked at when it is read
            require_candidates(datasets.train, recipe, what="data.train")
        require_candidates(next(iter(datasets.evals.values()), []), recipe, what="the first set of data.eval")
        renderer.pool = list(datasets.train) if renderer.altered == "other" else []
        head, ahead = output_head(adapted.model, where="objective.name"), virtual_tokens(adapted.model)
        dtype = adapted.backbone.model.dtype

        def tokens(batch: PreferenceBatch) -> torch.Tensor:
            return answer_logps(adapted.model, head, _here(batch, adapted), tokens=True)

        renderer.share = False
        if not ahead:
            share_where_exact(adapted.model, renderer, rows_to_try(datasets), run=tokens)
        objective = PreferenceObjective(_settings(section), head=head, reference=None, dtype=dtype, ahead=ahead)
        if section.name not in WITHOUT_REFERENCE:
            objective.reference = _reference(
                recipe, adapted, datasets, lambda batch: objective.logps(adapted.model, batch)
            )
        return objective

    def proof_rows(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> list[dict[str, torch.Tensor]]:
        """Real rows with their first answers, a batch each."""
        chat, dtype = preference_renderer(datasets).chat, getattr(torch, run.recipe.model.dtype)
        samples = datasets.shown(run.recipe.export.verify_rows)
        rows = []
        for sample in samples:
            whole = with_answer(sample, sample.candidates[0]) if sample.candidates else sample
            batch = collate([chat.render(whole)], pad_token_id=adapted.backbone.pad_token_id)
            inputs = {key: one.to(dtype) if one.is_floating_point() else one for key, one in batch.inputs.items()}
            rows.append({**inputs, "labels": batch.labels})
        return rows

    def evaluate(self, run: RunFolder, adapted: Adapted, datasets: Datasets) -> None:
        """Every model's answers (`predictions.jsonl`) and which answer of a pair it holds likelier."""
        store = PredictionStore()
        likelier: dict[str, dict[str, list[float]]] = {}
        evals = {name: [one for one in samples if one.references] for name, samples in datasets.evals.items()}
        for which, model, backbone in models(run, adapted, self.base(run.recipe, run.path)):
            for name, samples in evals.items():
                answer_set(run, store, which, model, backbone, name=name, samples=samples, datasets=datasets)
                if run.recipe.objective.name != "kto" and all(one.candidates for one in samples):
                    found = _likelier(run.recipe, model, backbone, samples, datasets)
                    likelier.setdefault(name, {})[which] = found
        store.write(run.predictions)
        write_json(run.path / LIKELIER, likelier)

    def scores(self, run: RunFolder) -> dict[str, Any]:
        """Win rate over the base, the recipe's metrics, and the share of pairs ranked rightly."""
        if not run.predictions.is_file():
            return {}
        recipe, store = run.recipe, PredictionStore.read(run.predictions)
        return score_preferences(
            store.records,
            read_json(run.path / LIKELIER),
            models=[which for which in recipe.evaluate.models if which in store.models],
            metrics=recipe.evaluate.metrics,
            group_by=recipe.evaluate.group_by,
            bootstrap_samples=recipe.evaluate.bootstrap_samples,
            seed=recipe.train.seed,
        )

    def measure(self, renderer: RowRenderer, samples: Sequence[Sample]) -> dict[str, list[int]]:
        """Tokens of each row's longest conversation, those of pictures, and the supervised ones of all its answers."""
        assert isinstance(renderer, PreferenceRenderer)
        rows = [renderer.rendered(sample) for sample in samples]
        return {
            "all": [max(len(one.input_ids) for one in row) for row in rows],
            "image": [row[0].media_tokens for row in rows],
            "supervised": [sum(int((one.labels >= 0).sum()) for one in row) for row in rows],
        }

    def memory(
        self, recipe: Recipe, backbone: Backbone, *, trainable: int, lengths: Mapping[str, Sequence[int]] | None
    ) -> dict[str, int] | None:
        """As for conversations of both answers; less where they share their prompt."""
        found = Chat().memory(recipe, backbone, trainable=trainable, lengths=lengths)
        return found and {name: 2 * value for name, value in found.items()}


def _settings(section: ObjectiveSection) -> Settings:
    name: Any = section.name
    return Settings(
        name=name,
        loss_type=section.loss_type,
        beta=section.beta,
        label_smoothing=section.label_noise,
        sft_weight=section.sft_weight,
        image_weight=section.image_weight,
        gamma=section.gamma,
        desirable_weight=section.desirable_weight,
        undesirable_weight=section.undesirable_weight,
    )


def mismatched(thumbs: Sequence[Sample]) -> list[Sample]:
    """Thumbs (score 1 or 0) with the next row's answer that reads otherwise as a second candidate."""
    return [
        with_other(sample, (thumbs[(index + step) % len(thumbs)].candidates[0].text for step in range(1, len(thumbs))))
        for index, sample in enumerate(thumbs)
    ]


def with_other(thumb: Sample, others: Iterable[str]) -> Sample:
    """A thumb (score 1 or 0) with the first text that reads otherwise as a second candidate."""
    own = thumb.candidates[0]
    text = next((text for text in others if text != own.text), own.text)
    first = dataclasses.replace(own, score=float(bool(own.good)))
    return dataclasses.replace(thumb, candidates=(first, Candidate(text, media=own.media)))


def _texts_behind(rows: Callable[[int], Sample], number: int, of: int) -> Iterator[str]:
    """Answers of the rows behind one of a streamed set (`of` rows), those that are thumbs."""
    for step in range(1, min(of, _BEHIND)):
        try:
            thumbs = as_thumbs(rows((number + step) % of))
        except DataError:
            continue
        if len(thumbs) == 1 and thumbs[0].candidates:
            yield thumbs[0].candidates[0].text


def only_one(sample: Sample, made: Sequence[Sample], what: str, fields: str) -> Sample:
    """The one row that a row of a streamed set becomes. Raises DataError for none and for several."""
    if len(made) != 1:
        raise DataError(
            f"the row gives {len(made)} {what}s",
            where=sample.where or sample.id,
            allowed=f"one {what} in each row of a streamed set",
            do=f"write a row for each {what}, with {fields}, or take streaming away",
        )
    return made[0]


def rows_to_try(datasets: Datasets) -> Sequence[Sample]:
    """Training rows to look at the model with; of streamed ones the first."""
    return near(datasets.train, CHECKED, datasets.renderer) if isinstance(datasets.train, Streamed) else datasets.train


def answer_set(
    run: RunFolder,
    store: PredictionStore,
    which: str,
    model: Any,
    backbone: Backbone,
    *,
    name: str,
    samples: Sequence[Sample],
    datasets: Datasets,
) -> None:
    """Put a model's answers to one set into the store."""
    evaluate = run.recipe.evaluate
    with run.journal.progress(len(samples), f"answers of {which} to {name}") as bar:
        answers = generate_answers(
            model,
            backbone.processor,
            preference_renderer(datasets).chat,
            samples,
            batch_size=evaluate.per_device_eval_batch_size,
            max_new_tokens=evaluate.max_new_tokens,
            num_beams=evaluate.num_beams,
            device=next(model.parameters()).device,
            progress=bar.update,
        )
    store.add(name, which, samples, answers=answers, folder=run.path)


def _likelier(
    recipe: Recipe, model: Any, backbone: Backbone, samples: Sequence[Sample], datasets: Datasets
) -> list[float]:
    head, device = output_head(model, where="evaluate"), next(model.parameters()).device
    was_training = model.training
    model.eval()
    found = answer_values(
        preference_renderer(datasets),
        samples,
        lambda batch: answer_logps(model, head, batch, ahead=virtual_tokens(model)) / batch.lengths.to(device),
        batch_size=recipe.evaluate.per_device_eval_batch_size,
        place=lambda batch: placed(batch, backbone.model.dtype, device),
    )
    model.train(was_training)
    return [float(row[0] > row[1]) for row in found]


def _here(batch: PreferenceBatch, adapted: Adapted) -> PreferenceBatch:
    return placed(batch, adapted.backbone.model.dtype, next(adapted.model.parameters()).device)


def _reference(recipe: Recipe, adapted: Adapted, datasets: Datasets, run: Run) -> Run:
    """The adapter off in every step, or a table of the model as it is now."""
    off = AdapterOff(adapted.model, run) if adapted.switches else None
    if not recipe.objective.precompute_reference:
        assert off is not None  # a rule of the recipe
        return off

    def all_batches() -> Iterator[PreferenceBatch]:
        """The training rows in the micro-batches of the first epoch, the first evaluation set as the engine cuts it."""
        train, micro = recipe.train, recipe.train.per_device_train_batch_size
        plan = StepPlan(rows=len(datasets.train), micro_batch=micro, micro_per_step=1, seed=train.seed)
        renderer = preference_renderer(datasets)
        for step in range(plan.steps_for(1.0)):
            yield renderer.assemble([(datasets.train[row], epoch) for row, epoch in plan.step_rows(step)])
        held, size = next(iter(datasets.evals.values()), []), recipe.evaluate.per_device_eval_batch_size
        for start in range(0, len(held), size):
            yield renderer.assemble([(sample, 0) for sample in held[start : start + size]])

    path = table_path(*_facts(recipe, adapted, datasets))
    adapted.model.eval()
    with _precision(recipe, adapted):
        table = make_table((_here(batch, adapted) for batch in all_batches()), run, path=path)
    return Kept(table)


def _facts(recipe: Recipe, adapted: Adapted, datasets: Datasets) -> list[str]:
    """All that the table's numbers depend on."""
    backbone, train = adapted.backbone, recipe.train
    base = fingerprint(backbone.folder) if backbone.folder is not None else {"name": backbone.name}
    start = recipe.adapter.init_from
    return [
        str(sorted(base.items())),
        recipe.model.model_dump_json(),
        recipe.quantization.model_dump_json(),
        recipe.data.model_dump_json(exclude={"train", "eval"}),
        recipe.adapter.model_dump_json() if start or recipe.adapter.init_lora_weights != "default" else "adapter off",
        "" if start is None else adapter_digest(Path(start).expanduser()),
        datasets.fingerprint,
        digest_of_rows(next(iter(datasets.evals.values()), [])),
        f"{train.seed} {train.per_device_train_batch_size} {recipe.evaluate.per_device_eval_batch_size} {train.bf16}",
        f"{recipe.objective.name} {preference_renderer(datasets).share} {sorted(versions().items())}",
    ]


def _precision(recipe: Recipe, adapted: Adapted) -> AbstractContextManager[Any]:
    device = next(adapted.model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16) if recipe.train.bf16 else nullcontext()
