"""Small working processors made on the spot: a byte-level BPE tokenizer, real processor classes, real templates."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaProcessor,
    MllamaImageProcessor,
    MllamaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from mmft.data.sample import MediaRef, Piece, Sample, Turn

SPECIALS = [
    "<pad>", "<bos>", "<eos>", "<image>", "<|im_start|>", "<|im_end|>", "<end_of_utterance>",
    "<fake_token_around_image>", "<global-img>", *[f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)],
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|image|>", "<|python_tag|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<video>",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>\n{% else %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% for c in message.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MLLAMA = (
    "{{- bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% for c in message.content %}{% if c.type == 'image' %}<|image|>{% else %}{{ c.text | trim }}{% endif %}"
    "{% endfor %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAVA15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}{% for content in message['content'] | selectattr('type', 'equalto', "
    "'text') %}{{ content['text'] + ' '}}{% endfor %}{% else %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '}}{% endgeneration %}"
    "{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
MARKED = CHATML.replace(
    "{% for p in m.content %}",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content[0].text }}<|im_end|>{% endgeneration %}\n{% else %}"
    "{% for p in m.content %}",
).replace("{% endfor %}<|im_end|>\n{% endfor %}", "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}")

CORPUS = [
    "What is at the top left? How many pictures are there? Is there a cat? Where is the dog? yes no red blue green",
    "assistant user system You are a helpful assistant. User: Assistant: the quick brown fox, 12 345 top right bottom",
]


@lru_cache
def tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 20, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        core.post_processor = TemplateProcessing(
            single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", core.token_to_id("<bos>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", model_max_length=100_000
    )


@lru_cache
def processor(kind: str = "llava", template: str | None = None):
    tok = tokenizer(bos=kind in ("mllama", "llava_bos"))
    if kind.startswith("llava"):
        image = CLIPImageProcessor(
            size={"shortest_edge": 192}, crop_size={"height": 192, "width": 192}, do_center_crop=True
        )
        return LlavaProcessor(
            image, tok, patch_size=32, vision_feature_select_strategy="full", chat_template=template or CHATML
        )
    if kind == "idefics3":
        image = Idefics3ImageProcessor(
            size={"longest_edge": 64}, max_image_size={"longest_edge": 32}, do_image_splitting=True
        )
        return Idefics3Processor(image, tok, image_seq_len=4, chat_template=template or SMOLVLM)
    if kind == "qwen2_vl":
        image = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
        return Qwen2VLProcessor(image, tok, Qwen2VLVideoProcessor(), chat_template=template or QWEN2_VL)
    if kind == "mllama":
        image = MllamaImageProcessor(size={"height": 32, "width": 32}, max_image_tiles=4)
        return MllamaProcessor(image, tok, chat_template=template or MLLAMA)
    raise ValueError(kind)


def picture(seed: int = 0, size: tuple[int, int] = (40, 30)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values, "RGB")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def sample(
    *texts: str, images: int = 1, system: str | None = None, seed: int = 0, size=(40, 30), id: str = "a"
) -> Sample:
    """texts: question, answer, question, answer...; the pictures stand in the first question."""
    turns = [Turn("system", (Piece("text", system),))] if system else []
    for index, text in enumerate(texts):
        head = (Piece("image"),) * images if index == 0 else ()
        turns.append(Turn(("user", "assistant")[index % 2], (*head, Piece("text", text))))
    media = tuple(MediaRef(data=encoded(picture(seed + index, size))) for index in range(images))
    return Sample(id=id, turns=tuple(turns), media=media, where=f"rows.jsonl:{seed + 1}")


def write(folder: Path, name: str, image: Image.Image) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name)
    return name
