"""Each rule of the table fires on its case with its words, at its line, and is silent beside it."""

from __future__ import annotations

import pytest

from mmft.recipe.check import RULES

HEAD = "model: shipped:nano-vlm\ndataset: rows.jsonl\n"
Q4 = "load_in_4bit: true\n"
CASES = [
    ("adapter: {init_lora_weights: pisa}\n", "adapter.init_lora_weights: 'pisa' is not allowed\n  at      r.yaml:3"),
    (
        "adapter: {use_dora: true, init_lora_weights: olora}\n",
        "adapter.use_dora: true, but with init_lora_weights: olora the lengths of the rows",
    ),
    (
        "load_in_8bit: true\nadapter: {use_dora: true}\n",
        "adapter.use_dora: true, but bitsandbytes gives the weight of an 8-bit layer away",
    ),
    (
        "adapter: {init_from: none, init_lora_weights: pissa}\n",
        "adapter.init_from: the adapter of the folder is the start, so init_lora_weights: pissa has no effect",
    ),
    ("adapter: {init_from: none, method: full}\n", "adapter.init_from: no effect, since adapter.method is full"),
    ("adapter: {init_from: none}\n", "adapter.init_from: 'none' holds no adapter_config.json"),
    (
        "adapter: loftq\n",
        "adapter.init_lora_weights: loftq makes good for the error of quantization, but the base is not quantized",
    ),
    (
        Q4 + "adapter: loftq\n",
        "export.merge_onto: base, but an adapter that started with loftq holds the error of quantization",
    ),
    (
        "adapter: prompt\n",
        "export.merge: true, but what adapter.method: prompt trains cannot become part of the weights\n"
        "  at      r.yaml:1\n  do      set export.merge: false and evaluate.models: [base, adapter]",
    ),
    (
        "adapter: prefix\nmerge: false\nmodels: [base, adapter]\ngradient_checkpointing: true\n",
        "train.gradient_checkpointing: true, but a prefix lives in the key-value cache",
    ),
    (
        "memory_budget: 2\ngradient_checkpointing: true\n",
        "train.memory_budget says how many layers to recompute, but train.gradient_checkpointing: true recomputes all",
    ),
    (
        "adapter: prefix\nmerge: false\nmodels: [base, adapter]\nmemory_budget: 2\n",
        "train.memory_budget is only known for answers (objective sft)",
    ),
    (
        Q4 + "adapter: ia3\n",
        "model.dtype: bfloat16, but peft's ia3 gives float32 out of these quantized layers",
    ),
    (
        "adapter: {method: vera, use_dora: true}\n",
        "adapter.use_dora: no effect, since adapter.method is vera\n  at      r.yaml:3\n"
        "  allowed use_dora with method lora\n  do      delete the line, or choose another method",
    ),
    (
        "adapter: {method: prompt, targets: [vision]}\nmerge: false\nmodels: [base]\n",
        "adapter.targets: no effect, since adapter.method is prompt",
    ),
    (
        "adapter: {method: ln_tuning}\n",
        "adapter.targets.0: language.attention holds no norms, and adapter.method ln_tuning trains nothing else",
    ),
    (
        "adapter: {method: bitfit, parts: {vision: full}}\n",
        "adapter.parts.vision: mode full, but bitfit saves nothing but biases",
    ),
    (Q4 + "adapter: loha\n", "adapter.method: loha, but language is quantized"),
    (
        Q4 + "adapter: {targets: [vision], modules_to_save: [language.mlp]}\n",
        "adapter.modules_to_save.0: language.mlp is trained whole, but language is quantized",
    ),
    (
        "quantization:\n  load_in_4bit: true\n  load_in_8bit: true\n",
        "quantization: load_in_4bit and load_in_8bit are both true\n  at      r.yaml:5\n  do      keep one of the two",
    ),
    (Q4 + "quantization: {parts: []}\n", "quantization.parts: empty, so nothing is quantized"),
    (Q4 + "adapter: {method: full}\n", "adapter.method: full, but language is quantized\n  at      r.yaml:4"),
    (
        Q4 + "adapter: {targets: [projector], parts: {language: {mode: full}}}\n",
        "adapter.parts.language: mode full, but language is quantized",
    ),
    (
        "merge_onto: dequantized\n",
        "export.merge_onto: dequantized, but the base is not quantized\n  at      r.yaml:3\n"
        "  do      write export.merge_onto: base, or set quantization.load_in_4bit: true",
    ),
    (
        "effective_batch_size: 12\n",
        "train.effective_batch_size: 12 is not a multiple of per_device_train_batch_size (8)\n  at      r.yaml:3\n"
        "  do      change one of the two",
    ),
    (
        "effective_batch_size: 16\ngradient_accumulation_steps: 3\n",
        "train.gradient_accumulation_steps: 3 contradicts effective_batch_size (16) at 8 rows a forward",
    ),
    (
        "load_best_model_at_end: true\nval_dataset: held.jsonl\n",
        "train.load_best_model_at_end: true, but eval_steps is 0: there is no evaluation to choose by\n"
        "  at      r.yaml:3\n  do      set train.eval_steps",
    ),
    (
        "patience: 2\nval_dataset: held.jsonl\n",
        "train.early_stopping_patience: 2, but eval_steps is 0: there is no evaluation to stop by",
    ),
    (
        "patience: 2\neval_steps: 1\n",
        "data.eval: missing, but load_best_model_at_end or early_stopping_patience needs evaluation rows",
    ),
    (
        "adapter: {targets: [language, vision], parts: {vision: frozen}}\n",
        "adapter.parts.vision: frozen, but adapter.targets names vision\n  at      r.yaml:3\n"
        "  do      keep one of the two",
    ),
    (
        "adapter: {parts: {vision: {lora_rank: 4}}}\n",
        "adapter.parts.vision: no effect, since adapter.targets does not name vision\n  at      r.yaml:3\n"
        "  do      add vision to adapter.targets",
    ),
    (
        "adapter: {parts: {vision: {mode: full, lora_rank: 4}}}\n",
        "adapter.parts.vision: lora_rank and lora_alpha have no effect: its mode is full",
    ),
    (
        "export: {merge: false}\nevaluate: {models: [merged]}\n",
        "evaluate.models: merged, but export.merge is false: there is no merged model\n  at      r.yaml:4",
    ),
    ("dtype: float16\n", "train.bf16: true, but model.dtype is float16: the two 16-bit types do not mix"),
    ("dtype: float16\nbf16: no\nadapter: full\n", "adapter.method: full, but model.dtype is float16"),
    ("targets: []\n", "adapter.targets: empty, so nothing would be trained"),
    ("data: {}\nmodels: []\n", "evaluate.models: empty"),
    ("metrics: []\n", "evaluate.metrics: empty"),
    ("max_shard_size: many\n", "export.max_shard_size: 'many' is not a size"),
    ("name: a/b\n", "name: 'a/b' cannot be a folder's name"),
    ("output_dir: rows.jsonl\n", "train.output_dir: 'rows.jsonl' is, or is below, a file"),
    ("output_dir: rows.jsonl/x\n", "train.output_dir: 'rows.jsonl/x' is, or is below, a file"),
    (
        "targets: [q_proj]\n",
        "adapter.targets.0: 'q_proj' is not a part\n  at      r.yaml:3\n"
        "  allowed vision, audio, projector, cross_attention, language, head, language.attention, language.mlp, "
        "vision.attention, vision.mlp, all-linear\n  do      name parts, not modules, for example language.attention",
    ),
    ("targets: [language.atention]\n", "(nearest: 'language.attention')"),
    ("targets: [vision, vision]\n", "adapter.targets: 'vision' is given twice"),
    (
        "eval_dataset: [held.jsnl]\n",
        "data.eval.0.path: 'held.jsnl' does not exist\n  at      r.yaml:3\n"
        "  allowed a .jsonl, .json, .parquet or .csv file, a folder of the datasets library, or "
        "shipped:emoji-scenes/NAME\n"
        "  do      check the path (nearest: 'held.jsonl')",
    ),
    ("eval_dataset: {path: held.jsonl, media_root: no-where}\n", "data.eval.0.media_root: 'no-where' is not a folder"),
    ("eval_dataset: [held.jsonl, held.jsonl]\n", "data.eval.1: its name 'held' is that of data.eval.0"),
    (
        "objective: {name: contrastive, label_smoothing_factor: 0.1}\n",
        "objective.label_smoothing_factor: contrastive does not read it",
    ),
    ("objective: {loss: sigmoid}\n", "objective.loss: sft does not read it"),
    ("objective: {captions_per_image: 2}\n", "objective.captions_per_image: sft does not read it"),
    ("objective: {train_logit_scale: false}\n", "objective.train_logit_scale: sft does not read it"),
    (
        "objective: {name: contrastive}\ntrain: {per_device_train_batch_size: 1}\n",
        "objective.name: contrastive with one row in a step",
    ),
    (
        "objective: {name: contrastive}\nevaluate: {metrics: [bleu]}\n",
        "evaluate.metrics: a contrastive run is scored by retrieval",
    ),
    (
        "objective: {name: contrastive}\nevaluate: {group_by: [type]}\n",
        "evaluate.group_by: scores of a run on pairs are not split by tags",
    ),
    (
        "objective: {name: contrastive}\nadapter: {init_lora_weights: eva}\n",
        "adapter.init_lora_weights: eva looks at batches of conversations",
    ),
    (
        "objective: {name: contrastive}\nadapter: {method: prompt}\nexport: {merge: false}\n"
        "evaluate: {models: [adapter]}\n",
        "adapter.method: prompt puts vectors before a language model's text",
    ),
    ("objective: {joint_weights: {caption: 2}}\n", "objective.joint_weights: sft does not read it"),
    ("objective: {decoder_layers: 3}\n", "objective.decoder_layers: sft does not read it"),
    ("objective: {name: joint, consistency: cycle}\n", "objective.consistency: joint does not read it"),
    ("objective: {name: mlm, consistency_weight: 1}\n", "objective.consistency_weight: mlm does not read it"),
    ("objective: {name: dual}\ndata: {system: x}\n", "data.system: a run of dual does not read it"),
    ("objective: {name: joint}\ndata: {supervise: last_answer}\n", "data.supervise: a run of joint does not read it"),
    ("objective: {name: dual}\nevaluate: {top_p: 0.9}\n", "evaluate.top_p: a run of dual does not read it"),
    ("objective: {name: mlm}\nevaluate: {num_beams: 2}\n", "evaluate.num_beams: a run of mlm does not read it"),
    (
        "objective: {name: mlm}\nevaluate: {max_new_tokens: 8}\n",
        "evaluate.max_new_tokens: a run of mlm does not read it",
    ),
    (
        "objective: {name: mlm}\nevaluate: {metrics: [bleu]}\n",
        "evaluate.metrics: an mlm run is scored by the accuracy and perplexity of hidden tokens",
    ),
    (
        "objective: {name: dual, joint_weights: {matching: 1}}\n",
        "objective.joint_weights: dual learning has no matching term",
    ),
    (
        "objective: {name: dual, joint_weights: {caption: 0, contrastive: 0}}\n",
        "objective.joint_weights: every term weighs 0, so nothing is learned",
    ),
    ("objective: {prompt: it is}\n", "objective.prompt: sft does not read it"),
    ("objective: {name: grpo, rewards: {}}\n", "objective.rewards: empty, so no answer is better than another"),
    ("objective: {name: rloo, rewards: {exact: 1}}\n", "objective.rewards: {'exact': 1.0} names something"),
    ("objective: {name: grpo, num_generations: 1}\n", "objective.num_generations: 1, but grpo compares answers"),
    ("objective: {name: ppo}\nadapter: {lora_dropout: 0.1}\n", "adapter.lora_dropout: 0.1, but answers are sampled"),
    ("objective: {name: ppo}\nsupervise: last_answer\n", "data.supervise: ppo learns from"),
    (
        "objective: {name: rloo}\nadapter: {method: prefix}\nexport: {merge: false}\nevaluate: {models: [adapter]}\n",
        "adapter.method: prefix is not sampled from",
    ),
    (
        "objective: {name: grpo, kl_coef: 0.1}\nadapter: {method: bitfit}\n",
        "objective.kl_coef: the reference is the model with its adapter off",
    ),
    ("objective: {name: ppo}\nadapter: {method: bitfit}\n", "objective.name: ppo keeps its value head beside"),
    ("objective: {name: ppo, variant: dapo}\n", "objective.variant: ppo does not read it"),
    ("objective: {gae_lambda: 0.5}\n", "objective.gae_lambda: sft does not read it"),
    ("objective: {kl_coef: 0.5}\n", "objective.kl_coef: sft does not read it"),
    ("objective: {clip: [0.1, 0.1]}\n", "objective.clip: sft does not read it"),
    ("objective: {num_generations: 2}\n", "objective.num_generations: sft does not read it"),
    ("objective: {num_iterations: 2}\n", "objective.num_iterations: sft does not read it"),
    ("objective: {temperature: 2}\n", "objective.temperature: sft does not read it"),
    ("objective: {value_coef: 2}\n", "objective.value_coef: sft does not read it"),
    ("objective: {rewards: {iou: 2}}\n", "objective.rewards: sft does not read it"),
    (
        "objective: {name: captioning, loss: sigmoid}\n",
        "objective.loss: captioning does not read it",
    ),
    (
        "objective: {name: captioning}\nadapter: {method: prefix}\nexport: {merge: false}\n"
        "evaluate: {models: [adapter]}\n",
        "adapter.method: prefix has no place in a captioner",
    ),
    ("evaluate: {top_p: 0.9, num_beams: 2}\n", "evaluate.top_p with evaluate.num_beams 2: a beam does not draw"),
    ("evaluate: {temperature: 0.5}\n", "evaluate.temperature: nothing is drawn, so it does nothing"),
    *[
        (f"objective: {{{field}: {value}}}\n", f"objective.{field}: sft does not read it")
        for field, value in {
            "task": "ordinal",
            "classes": "[a, b]",
            "strategy": "gated",
            "pooling": "bilstm",
            "hidden_size": 32,
            "modality_dropout": 0.1,
            "auxiliary_weight": 0.1,
            "modality_learning_rates": "{image: 0.1}",
            "balance": "weights",
            "focal_gamma": 2.0,
            "cache_features": "false",
        }.items()
    ],
    *[
        (
            f"objective: {{name: classification}}\n{section}: {{{field}: {value}}}\n",
            f"{section}.{field}: a classification run writes no text",
        )
        for section, field, value in (
            ("data", "system", "be kind"),
            ("data", "supervise", "last_answer"),
            ("evaluate", "max_new_tokens", 8),
            ("evaluate", "num_beams", 2),
            ("evaluate", "top_p", 0.9),
        )
    ],
    ("encoders: {text: org/name}\n", "model.encoders: sft does not read it"),
    (
        "objective: {name: classification}\nencoders: {text: org/name}\n",
        "model.name_or_path and model.encoders: two answers to what is trained",
    ),
    (
        "objective: {name: classification}\nevaluate: {metrics: [bleu]}\n",
        "evaluate.metrics: classification is scored by its task",
    ),
    (
        "objective: {name: classification, task: regression, balance: weights}\n",
        "objective.balance: weights needs one class",
    ),
    (
        "objective: {name: classification, task: regression, classes: [a]}\n",
        "objective.classes: a number has no classes",
    ),
    (
        "objective: {name: classification}\nadapter: {init_lora_weights: eva}\n",
        "adapter.init_lora_weights: eva looks at batches of conversations",
    ),
    (
        "objective: {name: contrastive, probe_set: held}\nval_dataset: held.jsonl\n",
        "objective.probe_set is watched at every evaluation, and train.eval_steps is 0",
    ),
    (
        "objective: {name: contrastive, probe_set: held}\neval_steps: 5\n",
        "objective.probe_set names an evaluation set, and data.eval is empty",
    ),
    *[
        (f"objective: {{{field}: {value}}}\n", f"objective.{field}: sft does not read it")
        for field, value in {
            "beta": 0.3,
            "gamma": 1.0,
            "precompute_reference": "true",
            "loss_type": "ipo",
            "label_noise": 0.1,
            "image_weight": 1.0,
            "rejected_image": "other",
            "sft_weight": 1.0,
            "desirable_weight": 2.0,
            "undesirable_weight": 2.0,
            "margin": "true",
            "centre_weight": 0.1,
            "answer_weight": 0.5,
        }.items()
    ],
    (
        "objective: {name: dpo}\nadapter: {method: full}\n",
        "objective.precompute_reference: with this adapter section the model without its adapter",
    ),
    (
        "objective: {name: dpo, precompute_reference: true, image_weight: 1.0}\n",
        "objective.precompute_reference: the changed pictures of image_weight are others in every epoch",
    ),
    (
        "objective: {name: dpo, label_noise: 0.1, loss_type: hinge}\n",
        "objective.label_noise: loss_type hinge does not read it",
    ),
    (
        "objective: {name: reward}\nadapter: {method: full}\n",
        "adapter.method: a reward head is kept beside an adapter, and full makes none",
    ),
    (
        "objective: {name: cpo}\nover_length: truncate_text\n",
        "data.over_length: truncate_text would cut the question of two answers differently",
    ),
    (
        "objective: {name: reward}\nevaluate: {metrics: [bleu]}\n",
        "evaluate.metrics: a reward model is scored by the pairs it ranks rightly",
    ),
    (
        "objective: {name: orpo}\nsupervise: last_answer\n",
        "data.supervise: answers that are compared always carry loss on the last turn alone",
    ),
    ("objective: {probe_set: held}\n", "objective.probe_set: sft does not read it"),
    ("objective: {probe_max_drop: 0.2}\n", "objective.probe_max_drop: sft does not read it"),
    ("objective: {probe_action: stop}\n", "objective.probe_action: sft does not read it"),
    ("evaluate: {class_tag: kind}\n", "evaluate.class_tag classifies with a dual encoder"),
    (
        "evaluate: {templates: [a photo of a {}]}\n".replace("[a photo of a {}]", "['a {}']"),
        "evaluate.templates classifies with a dual encoder",
    ),
    (
        "objective: {name: contrastive}\nevaluate: {templates: [photo]}\n",
        "evaluate.templates: every template needs one {} where",
    ),
    ("export: {interpolate: [0.5]}\n", "export.interpolate scores models between base and tuned by retrieval"),
    (
        "objective: {name: contrastive}\nexport: {interpolate: [0.5], merge: false}\n",
        "export.interpolate needs a merged model and the base in full precision",
    ),
    (
        "objective: {name: contrastive}\nexport: {interpolate: [1.0]}\n",
        "export.interpolate: 0 is the base and 1 the tuned model",
    ),
    *(
        (
            f"objective: {{name: contrastive}}\n{section}: {{{name}: {value}}}\n",
            f"{section}.{name}: a contrastive run writes no text",
        )
        for section, name, value in (
            ("data", "system", "Be short."),
            ("data", "supervise", "last_answer"),
            ("evaluate", "max_new_tokens", 8),
            ("evaluate", "num_beams", 2),
            ("evaluate", "top_p", 0.9),
        )
    ),
]


@pytest.mark.parametrize(("text", "expected"), CASES, ids=[text.replace("\n", "; ") for text, _ in CASES])
def test_rule(fails, text, expected):
    error = fails(HEAD + text)
    assert expected in error
    assert error.count("RecipeError") == 1


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("./nowhere", "model.name_or_path: './nowhere' does not exist"),
        ("/no/where", "model.name_or_path: '/no/where' does not exist"),
        ("a/b/c", "model.name_or_path: 'a/b/c' does not exist"),
        ("/dev/null", "model.name_or_path: '/dev/null' is a file"),
        ("s3://x/y", "model.name_or_path: 's3://x/y' is not a model"),
        ("''", "model.name_or_path: '' is not a model"),
    ],
)
def test_models(fails, model, expected):
    error = fails(f"model: {model}\ndata: rows.jsonl\n")
    assert error.startswith(
        f"RecipeError: {expected}\n  at      r.yaml:1\n  allowed a hub id (ORG/NAME), a folder, or "
    )


@pytest.mark.parametrize(
    "text",
    [
        Q4 + "merge_onto: dequantized\n",
        Q4 + "adapter: {method: full, targets: [projector]}\n",
        Q4 + "adapter: {parts: {projector: {mode: full, lr: 1e-5}, vision: {mode: frozen}}}\n",
        "effective_batch_size: 16\ngradient_accumulation_steps: 2\n",
        "effective_batch_size: 64\nper_device_train_batch_size: 8\ngradient_accumulation_steps: 2\n",
        "patience: 2\neval_steps: 1\nval_dataset: held.jsonl\n",
        "adapter: full\nmodels: [adapter]\n",
        "models: [base, merged]\n",
        "max_shard_size: 1.5GiB\n",
        "eval_dataset: shipped:emoji-scenes/heldout\n",
        "targets: [vision.mlp, head, all-linear]\n",
    ],
)
def test_what_is_fine(load, text):
    load(HEAD + text)


def test_hub_ids_and_shipped_models_are_not_looked_for(load):
    for name in ("org/name", "gpt2", "shipped:nano-vlm"):
        assert load(f"model: {name}\ndata: rows.jsonl\n").model.name_or_path == name


def test_every_rule_of_the_table_has_a_case(load):
    cases = "\n".join(expected for _, expected in CASES) + "data.train: empty"
    for rule in RULES:
        assert rule.what.split("{")[0][:40] in cases, rule.what


def test_no_data_sets(fails):
    assert fails("model: shipped:x\ndata: []\n") == (
        "RecipeError: data.train: empty\n  at      r.yaml:2\n  allowed a list of data sets\n"
        "  do      name at least one data set"
    )
