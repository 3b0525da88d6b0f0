"""The recipe: one pydantic model per section, closed (an unknown key is an error), frozen, no torch.

Field names are those of `transformers.TrainingArguments` and of peft; the spellings of other tools are accepted
as aliases (`mmft/recipe/aliases.py`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmft.recipe.objective import ObjectiveSection
from mmft.recipe.section import Count, DType, FastName, PartName, Positive, Rate, Section, Share

__all__ = [
    "COMPOSED",
    "AdapterSection",
    "DataSection",
    "DataSource",
    "EvaluateSection",
    "ExportSection",
    "ModelSection",
    "ObjectiveSection",
    "PartAdapter",
    "PartName",
    "QuantizationSection",
    "Recipe",
    "Section",
    "TrainSection",
]


COMPOSED = "composed"
"""`model.name_or_path` of a model that the run composes of `model.encoders`."""


class ModelSection(Section):
    """Which pretrained backbone is loaded, and how."""

    name_or_path: str
    """A hub id, a folder, or `shipped:nano-vlm`; left out where `encoders` are given (`composed` for a table
    alone)."""
    encoders: dict[str, str] = {}
    """Encoders of a fusion model (`classification`): a column, or a kind of columns (image, text, audio, video), to a
    hub id, a folder, or `shipped:NAME`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; pin a commit for a run that others must repeat."""
    model_type: str | None = None
    """transformers' name of the family; only `mmft plan` reads it, when the hub is out of reach."""
    dtype: DType = "bfloat16"
    """Type of the weights in memory (those that are not quantized)."""
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"
    """Attention kernel, by transformers' names."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A model that is composed of encoders has no name of its own."""
        if isinstance(given, dict) and given.get("encoders") and "name_or_path" not in given:
            return {**given, "name_or_path": COMPOSED}
        return given


class QuantizationSection(Section):
    """bitsandbytes quantization of the frozen base; absent keys mean no quantization."""

    load_in_4bit: bool = False
    """Linear layers in 4 bits (QLoRA)."""
    load_in_8bit: bool = False
    """Linear layers in LLM.int8()."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code book of the 4-bit type."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the quantization constants too (0.37 bit a parameter)."""
    bnb_4bit_compute_dtype: DType = "bfloat16"
    """Type the products are computed in."""
    parts: tuple[PartName, ...] = ("language",)
    """Parts whose linear layers are quantized; the vision tower stays in 16 bits unless it is named here."""


class PartAdapter(Section):
    """How one part is trained, where it differs from the adapter section."""

    mode: Literal["frozen", "lora", "full"] = "lora"
    """`lora`: by `adapter.method`; `full` trains the part's own weights and saves them with the adapter."""
    lora_rank: Positive | None = None
    """Rank in this part."""
    lora_alpha: Rate | None = None
    """Alpha in this part."""
    learning_rate: Rate | None = None
    """Peak learning rate of this part."""


class AdapterSection(Section):
    """What is trained."""

    method: Literal[
        "lora",
        "adalora",
        "vera",
        "oft",
        "boft",
        "loha",
        "lokr",
        "ia3",
        "ln_tuning",
        "bitfit",
        "bottleneck",
        "prompt",
        "prefix",
        "full",
    ] = "lora"
    """peft's methods by their usual names; `bitfit` trains biases, `full` the targets' own weights."""
    targets: tuple[str, ...] = ("language.attention", "language.mlp")
    """Parts, or sub-parts as `part.attention`, `part.mlp`; `all-linear` means every linear layer of `language`."""
    layers: str | None = None
    """Which layers of the targets, as `last:8`, `first:4`, `2-5` or `0,3`; all if not given."""
    exclude: tuple[str, ...] = ()
    """Parts, sub-parts or modules that are taken out of the targets."""
    lora_rank: Positive = 16
    """Rank r of the update B A."""
    lora_alpha: Rate = 32.0
    """The update is scaled by alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Dropout on the adapter's input."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Train the length of each row of the weight apart from its direction (DoRA, Liu et al. 2024)."""
    init_lora_weights: str = "default"
    """Where B A starts: `default` (B = 0), `pissa`, `pissa_niter_N`, `olora`, `eva`, `loftq`."""
    loraplus_lr_ratio: Rate | None = None
    """B learns this many times faster than A (LoRA+, Hayou et al. 2024)."""
    oft_block_size: Positive = 32
    """Size of the rotations of `oft` and `boft`; it must divide the layers' input widths."""
    num_virtual_tokens: Positive = 20
    """Length of the prompt or prefix."""
    bottleneck_size: Positive = 64
    """Inner width of a bottleneck adapter."""
    bottleneck_placement: Literal["serial", "parallel"] = "serial"
    """Behind the sub-layer (Houlsby et al. 2019) or beside it (He et al. 2022)."""
    modules_to_save: tuple[str, ...] = ()
    """Parts, sub-parts or modules that are trained whole and saved with the adapter."""
    init_from: str | None = None
    """An adapter folder to go on from; it must be of this method, with these targets."""
    parts: dict[PartName, PartAdapter] = {}
    """Per-part mode, rank, alpha and learning rate."""


class DataSource(Section):
    """One data set."""

    path: str
    """A .jsonl/.json/.parquet/.csv file, a caption file, a folder, or `shipped:SET/NAME` (sets: emoji-scenes,
    emoji-pairs, fusion)."""
    name: str | None = None
    """Name in reports; the file's stem if not given."""
    format: Literal[
        "auto",
        "messages",
        "llava",
        "prompt",
        "qa",
        "pairs",
        "preference",
        "table",
        "folder",
        "webdataset",
        "flickr8k",
        "coco",
        "vqav2",
        "gqa",
        "textvqa",
        "docvqa",
        "scienceqa",
        "chartqa",
    ] = "auto"
    """Layout of the rows (`messages` to `table`), or of the files; `auto` looks at them and prints what it chose."""
    media_root: str | None = None
    """Folder that image paths are relative to and may not leave; the data file's folder if not given."""
    num_samples: Positive | None = None
    """Only this many rows, chosen by the seed; `path#1000` says the same."""
    weight: Rate | None = None
    """Share of the training rows that are of this set, in proportion to the other sets' weights."""
    streaming: bool = False
    """Read the rows as they come, of any number of .jsonl, .tar or .parquet files (`path` may be a pattern, or a .json
    with a `shardlist`); nothing is held in memory, and no row is looked at before its step."""
    repeat: Rate = 1.0
    """How often its rows come in an epoch; 0.5: half of them, others in the next epoch."""
    columns: dict[str, str] = {}
    """For `qa` and `pairs` rows: which column is `image`, `question`, `answer`, `caption`, `negatives`, `group`. For
    `table` rows the other way round: what a column is (`photo: image`, `age: numeric`, `y: label`)."""

    @model_validator(mode="before")
    @classmethod
    def _counted(cls, given: Any) -> Any:
        """`path#1000` is a path and `num_samples`."""
        if isinstance(given, dict) and isinstance(given.get("path"), str) and "num_samples" not in given:
            path, mark, count = given["path"].rpartition("#")
            if mark and path and count.isdecimal():
                return {**given, "path": path, "num_samples": int(count)}
        return given


class DataSection(Section):
    """What is learned from, and what is evaluated on."""

    train: tuple[DataSource, ...]
    """Training sets; their rows are mixed."""
    eval: tuple[DataSource, ...] = ()
    """Evaluation sets; the first is the one that `scores` in the report speaks of."""
    temperature: Rate = 1.0
    """Training sets of n rows come in proportion to n^(1/T); 1: as many as they have, larger: more alike."""
    max_length: Positive = 2048
    """Longest row in tokens, image tokens included."""
    over_length: Literal["error", "drop", "truncate_text", "shrink_images"] = "error"
    """What happens to a longer row: `truncate_text` takes whole turns off its end, then the ends of its questions;
    `shrink_images` makes its pictures smaller. Image tokens are never cut; what is changed is counted and listed."""
    system: str | None = None
    """System turn put before rows that have none."""
    supervise: Literal["answers", "last_answer"] = "answers"
    """Which assistant turns carry loss."""
    max_image_pixels: Positive = 40_000_000
    """A picture whose header says more than this is refused before it is decoded."""
    video_frames: Annotated[int, Field(ge=1, le=1024)] = 8
    """Frames that a conversation takes from each video: the middles of equal stretches."""
    augmentation: dict[str, float] = {}
    """Random changes of training pictures that keep their size, by name and strength: horizontal_flip, vertical_flip,
    grayscale (probabilities), crop (share of the area), color (share), rotate (degrees), blur (pixels)."""
    max_bad_fraction: Share = 0.0
    """Share of bad rows that are left out (counted and listed) before the run is refused; above 0, every medium is
    opened before the first step."""


class TrainSection(Section):
    """How it is minimised. Lengths in steps mean optimizer steps."""

    output_dir: str = "runs"
    """The run folder is `output_dir/NAME`."""
    seed: int = 0
    """Seed of the order, of dropout, of the adapters' start."""
    per_device_train_batch_size: Positive = 8
    """Rows in one forward."""
    gradient_accumulation_steps: Positive = 1
    """Forwards per optimizer step, when `effective_batch_size` is not given."""
    effective_batch_size: Positive | None = None
    """Rows per optimizer step over all processes; accumulation follows from it, so the numbers do not depend on the
    number of processes."""
    num_train_epochs: Rate = 1.0
    """Passes over the data, when `max_steps` is not given."""
    max_steps: Positive | None = None
    """Optimizer steps."""
    learning_rate: Rate = 2e-4
    """Peak learning rate."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up."""
    warmup_ratio: Share = 0.03
    """Share of the steps that warm up linearly."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW's decay; biases, norms and one-dimensional weights are left out."""
    adam_beta1: Share = 0.9
    """AdamW's first moment."""
    adam_beta2: Share = 0.999
    """AdamW's second moment."""
    adam_epsilon: Rate = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Gradients are clipped to this norm; 0 switches it off."""
    skip_nonfinite_steps: Count = 0
    """Steps with a NaN or infinite loss or gradient that are left out (counted, their rows named) before the run stops;
    0: the first one stops it."""
    bf16: bool = True
    """Products in bfloat16 (autocast)."""
    gradient_checkpointing: bool = False
    """Recompute the language layers' activations in the backward pass."""
    memory_budget: Rate | None = None
    """GB that training may hold (device memory; on a CPU what no file backs, imports included): as few language layers
    as fit are recomputed, by an estimate and a probe step on the largest forward of real rows (`sft`)."""
    logging_steps: Positive = 10
    """Steps between two lines of metrics."""
    eval_steps: Count = 0
    """Steps between two evaluations of the loss; 0: only at the end."""
    save_steps: Count = 100
    """Steps between two checkpoints; 0: only at the end."""
    save_total_limit: Positive = 2
    """Checkpoints kept; an older one is deleted only after a newer one verifies."""
    early_stopping_patience: Count = 0
    """Evaluations without a better loss after which training stops; 0 switches it off."""
    load_best_model_at_end: bool = False
    """Keep the weights of the best evaluation instead of the last."""
    fast: bool | tuple[FastName, ...] = True
    """Optimisations that leave the loss and its gradients as they are, each where it is exact (`mmft plan` lists them
    with the reason); false: none of them, a list: these alone."""
    packing: bool | Literal["auto"] = "auto"
    """Rows of a step behind one another without padding. `auto`: where that leaves the numbers as they are, else rows
    sorted by length; true: a model that cannot is refused; false: neither."""
    train_sampling_strategy: Literal["random", "group_by_media"] = "random"
    """`group_by_media` shuffles pictures instead of rows: rows of a picture come behind each other, so that their step
    pays for it once (`shared_prefix`). Their gradients are alike, so a step sees fewer pictures."""
    dataloader_num_workers: Count = 0
    """Processes that open and render rows."""
    ddp_timeout: Positive = 21600
    """Seconds that a process waits for the others before the run ends; evaluation by the first one takes its time."""
    report_to: tuple[str, ...] = ()
    """`tensorboard`, `wandb`, … by accelerate's names; metrics.jsonl is always written."""


class EvaluateSection(Section):
    """How base, adapter and merged model are compared."""

    models: tuple[Literal["base", "adapter", "merged"], ...] = ("base", "adapter", "merged")
    """Which models answer the evaluation rows."""
    metrics: tuple[
        Literal[
            "exact_match",
            "vqa_accuracy",
            "token_f1",
            "cider",
            "bleu",
            "bleu_1",
            "bleu_2",
            "bleu_3",
            "rouge_l",
            "meteor",
        ],
        ...,
    ] = ("exact_match", "token_f1")
    """The first one is the headline; captions are scored by CIDEr, BLEU-1 to 4, ROUGE-L and METEOR if none is named."""
    per_device_eval_batch_size: Positive = 16
    """Rows generated at once."""
    max_new_tokens: Positive = 64
    """Longest answer."""
    num_beams: Positive = 1
    """1 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Draw from the most probable tokens that hold this share together (nucleus sampling), by the run's seed; without
    it the search is greedy or a beam."""
    temperature: Rate = 1.0
    """Scores are divided by it before they are drawn from (with `top_p`)."""
    group_by: tuple[str, ...] = ()
    """Tags of the rows by which the scores are split, for example `type`."""
    class_tag: str | None = None
    """Tag that holds a row's class: adds zero-shot classification and a linear probe (`contrastive`)."""
    templates: tuple[str, ...] = ("{}",)
    """Sentences a class's name is put into, at `{}`; a class is the mean of them (`contrastive`)."""
    bootstrap_samples: Positive = 1000
    """Resamples behind each 95 % interval."""


class ExportSection(Section):
    """What is written at the end."""

    merge: bool = True
    """Write a merged model folder."""
    merge_onto: Literal["base", "dequantized"] = "base"
    """For a quantized base: merge into the original 16-bit weights, or into what training really saw."""
    dtype: DType | None = None
    """Type of the merged weights; the base's own if not given."""
    max_shard_size: str = "5GB"
    """Largest weight file."""
    interpolate: tuple[Share, ...] = ()
    """Models (1 - a) base + a tuned (WiSE-FT): all these a are scored, the first is written to `interpolated/`
    (`contrastive`)."""
    verify_rows: Count = 8
    """Evaluation rows on which merged and adapter model are compared."""


class Recipe(Section):
    """A whole run."""

    name: str
    """Name of the run; the file's stem if not given."""
    model: ModelSection
    """Backbone."""
    quantization: QuantizationSection = QuantizationSection()
    """Quantization of the base."""
    adapter: AdapterSection = AdapterSection()
    """What is trained."""
    data: DataSection
    """Data."""
    objective: ObjectiveSection = ObjectiveSection()
    """Objective."""
    train: TrainSection = TrainSection()
    """Engine."""
    evaluate: EvaluateSection = EvaluateSection()
    """Evaluation."""
    export: ExportSection = ExportSection()
    """Export."""
