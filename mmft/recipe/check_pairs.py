"""Rules of what only a run on pairs does: a probe set, classes of rows, models between base and tuned."""

from __future__ import annotations

from mmft.recipe.check_objective import FUSION_READS_NOT, told
from mmft.recipe.rules import Rule
from mmft.recipe.schema import Recipe


def _paired(recipe: Recipe) -> bool:
    return recipe.objective.name == "contrastive"


PAIRS_READ_NOT = FUSION_READS_NOT
"""Fields of conversations and of written answers."""
JOINT_READS_NOT = ("data.system", "data.supervise", "evaluate.top_p", "evaluate.temperature")
"""Fields of conversations and of drawn answers; captions of joint and dual runs are greedy or a beam's."""
ONLY_PAIRS_READ = ("evaluate.class_tag", "evaluate.templates", "export.interpolate")
"""Fields outside of the objective's section that other objectives refuse."""


def _not_paired(field: str) -> Rule:
    section, _, name = field.partition(".")
    return Rule(
        field,
        (field, "objective.name"),
        lambda r: _paired(r) and told(getattr(r, section), name),
        f"{field}: a contrastive run writes no text and reads no conversations",
        "take it out",
    )


def _not_joint(field: str) -> Rule:
    section, _, name = field.partition(".")
    refusing = ("mlm", *(("joint", "dual") if field in JOINT_READS_NOT else ()))
    return Rule(
        field,
        (field, "objective.name"),
        lambda r: r.objective.name in refusing and told(getattr(r, section), name),
        f"{field}: a run of {{objective.name}} does not read it",
        "take it out",
    )


def _unclassified(name: str) -> Rule:
    return Rule(
        f"evaluate.{name}",
        (f"evaluate.{name}", "objective.name"),
        lambda r: not _paired(r) and told(r.evaluate, name),
        f"evaluate.{name} classifies with a dual encoder, and objective.name is {{objective.name}}",
        "take it out",
    )


PAIR_RULES: tuple[Rule, ...] = (
    # A temperature without top_p is refused for every objective.
    *(_not_paired(field) for field in PAIRS_READ_NOT if field != "evaluate.temperature"),
    *(_not_joint(field) for field in PAIRS_READ_NOT if field != "evaluate.temperature"),
    Rule(
        "objective.probe_set",
        ("objective.probe_set", "train.eval_steps"),
        lambda r: _paired(r) and r.objective.probe_set is not None and not r.train.eval_steps,
        "objective.probe_set is watched at every evaluation, and train.eval_steps is 0",
        "set train.eval_steps, for example to a tenth of the steps",
    ),
    Rule(
        "objective.probe_set",
        ("objective.probe_set", "data.eval"),
        lambda r: _paired(r) and r.objective.probe_set is not None and not r.data.eval,
        "objective.probe_set names an evaluation set, and data.eval is empty",
        "add the set to data.eval, with a name",
    ),
    *(_unclassified(name) for name in ("class_tag", "templates")),
    Rule(
        "evaluate.templates",
        ("evaluate.templates",),
        lambda r: any(text.count("{}") != 1 for text in r.evaluate.templates) or not r.evaluate.templates,
        "evaluate.templates: every template needs one {{}} where the class's name goes",
        "write for example 'a photo of a {}.'",
    ),
    Rule(
        "export.interpolate",
        ("export.interpolate", "objective.name"),
        lambda r: not _paired(r) and bool(r.export.interpolate),
        "export.interpolate scores models between base and tuned by retrieval, and objective.name is {objective.name}",
        "take it out; mmft.export.interpolate.interpolate_models writes the weights of any model",
    ),
    Rule(
        "export.interpolate",
        ("export.interpolate", "export.merge", "quantization.load_in_4bit", "quantization.load_in_8bit"),
        lambda r: (
            bool(r.export.interpolate)
            and (not r.export.merge or r.quantization.load_in_4bit or r.quantization.load_in_8bit)
        ),
        "export.interpolate needs a merged model and the base in full precision",
        "set export.merge: true and take quantization out, or take export.interpolate out",
    ),
    Rule(
        "export.interpolate",
        ("export.interpolate",),
        lambda r: any(value in (0.0, 1.0) for value in r.export.interpolate),
        "export.interpolate: 0 is the base and 1 the tuned model, which are scored anyway",
        "give shares between them, for example [0.5]",
    ),
)
