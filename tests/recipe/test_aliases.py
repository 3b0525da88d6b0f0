"""Other tools' spellings mean the same; giving one thing twice is an error; what has no counterpart is explained."""

from __future__ import annotations

import pytest

from mmft.recipe import aliases
from mmft.recipe.normal import flat, sections
from mmft.recipe.schema import DataSource, PartAdapter

HEAD = "model: shipped:nano-vlm\ndata: rows.jsonl\n"

LLAMA_FACTORY = """
model_name_or_path: shipped:nano-vlm
stage: sft
finetuning_type: lora
lora_target: all
lora_rank: 8
quantization_bit: 4
dataset: rows.jsonl
cutoff_len: 512
output_dir: saves
logging_steps: 5
save_steps: 50
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
report_to: none
"""
SWIFT = """
model_id: shipped:nano-vlm
tuner_type: lora
torch_dtype: bfloat16
dataset: [rows.jsonl]
val_dataset: held.jsonl
max_length: 512
target_modules: language.attention, projector
attn_impl: flash_attn
dataloader_num_workers: 2
"""
AXOLOTL = """
base_model: shipped:nano-vlm
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_dropout: 0.05
datasets:
  - {path: rows.jsonl, type: messages}
sequence_len: 512
micro_batch_size: 2
num_epochs: 1
optimizer: adamw_torch
lr_scheduler: cosine
gradient-checkpointing: true
"""
UNSLOTH = """
model: {model_name: shipped:nano-vlm, max_seq_length: 512, load_in_4bit: true, dtype: torch.float32}
peft: {r: 8, lora_alpha: 8, random_state: 1}
training_args: {per_device_train_batch_size: 2, optim: adamw_torch, fp: 1}
dataset: rows.jsonl
"""


def test_llama_factory(load):
    recipe = load(LLAMA_FACTORY)
    assert recipe.adapter.targets == ("all-linear",) and recipe.adapter.lora_rank == 8
    assert recipe.quantization.load_in_4bit and recipe.data.max_length == 512
    assert recipe.train.report_to == () and recipe.train.num_train_epochs == 3.0 and recipe.train.output_dir == "saves"


def test_swift(load):
    recipe = load(SWIFT)
    assert recipe.adapter.targets == ("language.attention", "projector")
    assert recipe.model.attn_implementation == "flash_attention_2"
    assert len(recipe.data.eval) == 1 and recipe.train.dataloader_num_workers == 2


def test_axolotl(load):
    recipe = load(AXOLOTL)
    assert recipe.adapter.method == "lora" and recipe.quantization.load_in_4bit and recipe.adapter.lora_alpha == 16.0
    assert recipe.data.train[0].format == "messages" and recipe.train.per_device_train_batch_size == 2
    assert recipe.train.gradient_checkpointing


def test_unsloth(load, fails):
    recipe = load(UNSLOTH.replace(", fp: 1", "").replace(", random_state: 1", ""))
    assert (recipe.data.max_length, recipe.quantization.load_in_4bit, recipe.model.dtype) == (512, True, "float32")
    assert "train.fp: unknown key" in fails(UNSLOTH)


@pytest.mark.parametrize(
    ("spelled", "field", "value"),
    [
        ("torch_dtype: bf16", "model.dtype", "bfloat16"),
        ("dtype: fp32", "model.dtype", "float32"),
        ("model: {path: shipped:y, torch-dtype: half}\nbf16: no", "model.dtype", "float16"),
        ("lora_target_modules: [vision, projector]", "adapter.targets", ("vision", "projector")),
        ("targets: projector", "adapter.targets", ("projector",)),
        ("adapter: full", "adapter.method", "full"),
        ("train_type: full", "adapter.method", "full"),
        ("quantization_bit: 8", "quantization.load_in_8bit", True),
        ("quantization: 4bit", "quantization.load_in_4bit", True),
        ("quantization: null", "quantization.load_in_4bit", False),
        ("quantization: {quantization_bit: 4}", "quantization.load_in_4bit", True),
        ("gradient_accumulation: 4", "train.gradient_accumulation_steps", 4),
        ("global_batch_size: 16", "train.effective_batch_size", 16),
        ("lr_scheduler: constant_with_warmup", "train.lr_scheduler_type", "constant"),
        ("epochs: 2", "train.num_train_epochs", 2.0),
        ("max_train_steps: 9", "train.max_steps", 9),
        ("grad_clip: 0.5", "train.max_grad_norm", 0.5),
        ("report_to: tensorboard", "train.report_to", ("tensorboard",)),
        ("metrics: cider", "evaluate.metrics", ("cider",)),
        ("group_by: type", "evaluate.group_by", ("type",)),
        ("evaluation: {batch_size: 3}", "evaluate.per_device_eval_batch_size", 3),
        ("train: {batch_size: 3}", "train.per_device_train_batch_size", 3),
        ("objective: sft", "objective.name", "sft"),
        ("eval_dataset: {file: held.jsonl, limit: 2}", "data.eval.0.num_samples", 2),
        ("merge_lora: no", "export.merge", False),
        ("truncation_strategy: delete", "data.over_length", "drop"),
        ("adapter: {targets: [projector], parts: {projector: full}}", "adapter.parts.projector.mode", "full"),
        ("adapter: {parts: {language: {r: 2, alpha: 4}}}", "adapter.parts.language.lora_rank", 2),
    ],
)
def test_spelling(load, spelled, field, value):
    text = "data: {train: rows.jsonl}\n" if spelled.startswith("eval") else "dataset: rows.jsonl\n"
    text += spelled + ("\n" if spelled.startswith("model:") else "\nbase_model: shipped:x\n")
    if "full" in spelled and "parts" in spelled:
        text = text.replace("[projector]", "[language]")
    found = load(text)
    for part in field.split("."):
        found = (
            found[int(part)] if part.isdecimal() else found[part] if isinstance(found, dict) else getattr(found, part)
        )
    assert found == value


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("lr: 1\nlearning_rate: 1\n", "train.learning_rate: given twice, as `lr` (r.yaml:3) and as `learning_rate`"),
        ("lr: 1\ntrain: {lr: 2}\n", "train.learning_rate: given twice, as `lr` (r.yaml:3) and as `train.lr`"),
        ("dataset: rows.jsonl\n", "data.train: given twice, as `data` (r.yaml:2) and as `dataset`"),
        (
            "adapter: {r: 1, lora-rank: 2}\n",
            "adapter.lora_rank: given twice, as `adapter.r` (r.yaml:3) and as `adapter.lora-rank`",
        ),
        (
            "load_in_4bit: true\nadapter: qlora\n",
            "quantization.load_in_4bit: given twice, as `load_in_4bit` (r.yaml:3) and as `adapter: qlora`",
        ),
    ],
)
def test_twice_is_an_error(fails, text, what):
    error = fails(HEAD + text)
    assert error.startswith(f"RecipeError: {what}\n") and error.endswith("  do      keep one of the two")


def test_twice_in_a_source(fails):
    assert "data.train.0.file: unknown key" in fails(
        "model: shipped:x\ndataset: {path: rows.jsonl, file: rows.jsonl}\n"
    )


def test_what_has_no_counterpart(fails):
    for key, do in aliases.REFUSED.items():
        error = fails(HEAD + f"{key}: 1\n")
        assert error == f"RecipeError: {key}: not a key of mmft\n  at      r.yaml:3\n  do      {do}"
    assert "RecipeError: train.fp16: not a key of mmft" in fails(HEAD + "train: {fp16: true}\n")
    assert fails(HEAD + "optim: lion\n") == (
        "RecipeError: optim: 'lion' is not allowed\n  at      r.yaml:3\n"
        "  allowed adamw, adamw_torch, adamw_torch_fused, adamw_hf\n  do      delete the line; AdamW is used"
    )
    assert "quantization_bit: 3 is not allowed" in fails(HEAD + "quantization_bit: 3\n")


def test_the_tables_name_real_fields():
    for table in (aliases.KEYS, aliases.OWN_ONLY):
        for section, names in table.items():
            fields = sections()[section].model_fields
            assert set(names.values()) <= fields.keys()
            assert not names.keys() & fields.keys()
    assert set(aliases.SOURCE.values()) <= DataSource.model_fields.keys()
    assert set(aliases.PART.values()) <= PartAdapter.model_fields.keys()
    assert set(aliases.SECTIONS.values()) <= sections().keys()
    for dotted in (*aliases.ELSEWHERE.values(), *aliases.WORDS, *(f"{k}.{v}" for k, v in aliases.WHOLE.items())):
        section, _, field = dotted.partition(".")
        assert field in sections()[section].model_fields
    fields = {name for kind in sections().values() for name in kind.model_fields}
    assert not aliases.REFUSED.keys() & (fields | flat().keys())


def test_one_spelling_means_one_thing():
    seen = {}
    for section, names in aliases.KEYS.items():
        for spelled, field in names.items():
            assert seen.setdefault(spelled, (section, field)) == (section, field)
            assert flat()[spelled] == (section, field), spelled


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("finetuning_type: dora\n", {"method": "lora", "use_dora": True}),
        ("finetuning_type: freeze\nfreeze_trainable_layers: 2\n", {"method": "full", "layers": "last:2"}),
        ("freeze_trainable_layers: -3\n", {"layers": "first:3"}),
        ("adapter: pissa\n", {"method": "lora", "init_lora_weights": "pissa"}),
        ("pissa_init: true\n", {"init_lora_weights": "pissa"}),
        ("pissa_init: false\n", {"init_lora_weights": "default"}),
        ("peft_init_lora_weights: true\npeft_use_dora: true\n", {"init_lora_weights": "default", "use_dora": True}),
        ("lora: {init_weights: olora, exclude_modules: head}\n", {"init_lora_weights": "olora", "exclude": ("head",)}),
        ("lorap_lr_ratio: 16\n", {"loraplus_lr_ratio": 16.0}),
        ("additional_target: lm_head, projector\n", {"modules_to_save": ("lm_head", "projector")}),
        ("lora_modules_to_save: [lm_head]\n", {"modules_to_save": ("lm_head",)}),
        ("layers_to_transform: [0, 3]\n", {"layers": "0,3"}),
        ("adapter: {peft_type: LOKR, r: 2}\n", {"method": "lokr", "lora_rank": 2}),
        ("adapter: {method: BOFT, boft_block_size: 8}\n", {"method": "boft", "oft_block_size": 8}),
        ("adapter: {targets: [vision], parts: {vision: adapter, projector: train}}\n", {"targets": ("vision",)}),
    ],
)
def test_other_tools_adapters(load, text, expected):
    adapter = load(HEAD + text).adapter
    assert {name: getattr(adapter, name) for name in expected} == expected


def test_layers_that_are_no_number(fails):
    assert "freeze_trainable_layers: 0 is not allowed" in fails(HEAD + "freeze_trainable_layers: 0\n")


def test_where_another_adapter_goes_on(load, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "adapter_config.json").write_text("{}")
    assert load(HEAD + "adapter_name_or_path: old\n").adapter.init_from == "old"
