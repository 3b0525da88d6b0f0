"""A model that embeds, matches and writes: any dual encoder of transformers with a decoder that looks at the picture.

Made after CoCa (Yu et al. 2022, arXiv 2205.01917): one picture tower, one text tower for the embeddings, and a decoder
whose cross-attention reads the picture tower's tokens. CoCa's text tower is the lower half of its decoder; here the two
are apart, so that any dual encoder can be taken, and the decoder may start as the text tower's own first layers. The
matching head, which CoCa has not, stands on the decoder's state at the text's last token, the one that has seen
picture and text (ALBEF's stands on the first token of a bidirectional encoder).

No class of transformers has all three: `BlipForImageTextRetrieval` and `Blip2ForImageTextRetrieval` embed and match,
`BlipForConditionalGeneration` writes. `BlipJointModel` is BLIP's own composition of the first and the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BlipConfig,
    BlipForImageTextRetrieval,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel
from transformers.utils import ModelOutput

from mmft.errors import BackboneError

SCALE = 1 / 0.07
"""Factor of the similarities where a class brings none: ALBEF's and BLIP's start, a temperature of 0.07."""


@dataclass
class JointOutput(ModelOutput):
    """`logits` (n, T, vocabulary) of texts given their pictures, `logits_per_image` and `logits_per_text` (n, n) the
    scaled similarities, `itm_logits` (n, 2) whether row i's text belongs to row i's picture."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    itm_logits: Tensor | None = None


class JointConfig(PreTrainedConfig):
    """`dual`: config of the dual encoder; `decoder`: of the causal language model with cross-attention. The special
    tokens are those that the tokenizer puts around a text."""

    model_type = "mmft_joint"
    sub_configs = {"dual": AutoConfig, "decoder": AutoConfig}

    dual: Any = None
    decoder: Any = None
    start_token_id: int = 1
    end_token_id: int = 2
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in self.sub_configs:
            given = getattr(self, name)
            if isinstance(given, dict):
                setattr(self, name, sub_config(given))
            elif given is None:  # transformers builds every config empty, to see what differs from its defaults
                setattr(self, name, BertConfig() if name == "decoder" else AutoConfig.for_model("clip"))
        super().__post_init__(**kwargs)


def sub_config(given: dict[str, Any]) -> Any:
    """A transformers config from its saved dict; the outer loader decides about the type of the weights."""
    values = {key: value for key, value in given.items() if key not in ("model_type", "dtype")}
    # Through from_dict: some configs (timm's) turn their labels around only there.
    return type(AutoConfig.for_model(str(given["model_type"]))).from_dict(values)


class JointModel(PreTrainedModel, GenerationMixin):
    """See the module. `see`, `read`, `match` and `write` are what `objectives.joint` asks for."""

    config_class = JointConfig
    config: JointConfig
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: JointConfig) -> None:
        super().__init__(config)
        self.dual = AutoModel.from_config(config.dual)
        self.decoder = AutoModelForCausalLM.from_config(config.decoder)
        width = int(config.decoder.hidden_size)
        self.bridge_projection = nn.Linear(int(config.dual.vision_config.hidden_size), width)
        self.itm_head = nn.Linear(width, 2)
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The decoder's token table."""
        return self.decoder.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        """The decoder's vocabulary head."""
        return self.decoder.get_output_embeddings()

    def get_decoder(self) -> Any:
        """The language model that writes."""
        return self.decoder

    def get_encoder(self, modality: str | None = None) -> Any:
        """The picture tower for `image`, the text tower for `text` or if no modality is named, else None."""
        towers = {None: self.dual.text_model, "text": self.dual.text_model, "image": self.dual.vision_model}
        return towers.get(modality)

    def get_image_features(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """The dual encoder's."""
        return self.dual.get_image_features(pixel_values=pixel_values, **kwargs)

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        """The dual encoder's."""
        given = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.dual.get_text_features(
            input_ids=input_ids, **{key: value for key, value in given.items() if value is not None}
        )

    def see(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings (n, w) of length one, and the picture's tokens (n, t, width) as the decoder reads them."""
        found = self.get_image_features(pixel_values)
        return unit(found.pooler_output), self.bridge_projection(as_tokens(found))

    def match(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(k, 2) logits of pairs; column 1 says that they belong together."""
        states = self.decoder.base_model(**self._reading(tokens, input_ids, attention_mask)).last_hidden_state
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)
        return self.itm_head(states[torch.arange(len(states), device=states.device), last])

    def write(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(k, T, vocabulary): logits at t speak of the token at t + 1."""
        return self.decoder(**self._reading(tokens, input_ids, attention_mask)).logits

    def _reading(self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Any]:
        seen = torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "encoder_hidden_states": tokens,
            "encoder_attention_mask": seen,
            "use_cache": False,
        }

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> JointOutput:
        """All three heads on n pictures with one text each; no loss (objectives make it)."""
        left, tokens = self.see(pixel_values)
        right = unit(self.get_text_features(input_ids, attention_mask).pooler_output)
        scaled = left @ right.T * self.dual.logit_scale.exp()
        return JointOutput(
            logits=self.write(tokens, input_ids, attention_mask),
            logits_per_image=scaled,
            logits_per_text=scaled.T,
            itm_logits=self.match(tokens, input_ids, attention_mask),
        )

    @torch.no_grad()
    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        """(n, length) token ids of captions, the start token first; `options` are those of `generate`."""
        ends = {"eos_token_id": self.config.end_token_id, "pad_token_id": self.config.pad_token_id}
        return _spoken(self.decoder, tokens, start=self.config.start_token_id, **ends, **options)

    def generate(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """`speak` about pictures."""
        with torch.no_grad():
            return self.speak(self.see(pixel_values)[1], **options)


class BlipJointConfig(BlipConfig):
    """BLIP's own config under a name that leads to `BlipJointModel`."""

    model_type = "mmft_blip_joint"


class BlipJointModel(BlipForImageTextRetrieval, GenerationMixin):
    """`BlipForImageTextRetrieval` with the decoder of `BlipForConditionalGeneration` on the same picture tower, and a
    trained scale, which BLIP has and transformers' class leaves out (BLIP, Li et al. 2022, arXiv 2201.12086).

    Keys are those of the two upstream classes, so `compose_blip` takes both checkpoints as they are.
    """

    config_class = BlipJointConfig

    def __init__(self, config: BlipJointConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        self.text_decoder = BlipTextLMHeadModel(text)
        self.logit_scale = nn.Parameter(torch.tensor(SCALE).log())
        self.post_init()

    def get_output_embeddings(self) -> Any:
        """The decoder's vocabulary head."""
        return self.text_decoder.get_output_embeddings()

    def get_decoder(self) -> Any:
        """The language model that writes."""
        return self.text_decoder

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            self.logit_scale.fill_(torch.tensor(SCALE).log())

    @torch.no_grad()
    def speak(self, tokens: Tensor, **options: Any) -> Tensor:
        """(n, length) token ids of captions, the decoder's start token first."""
        text: Any = self.config.text_config
        ends = {"eos_token_id": text.sep_token_id, "pad_token_id": text.pad_token_id}
        return _spoken(self.text_decoder, tokens, start=text.bos_token_id, **ends, **options)

    def generate(self, pixel_values: Tensor, **options: Any) -> Tensor:
        """`speak` about pictures."""
        with torch.no_grad():
            return self.speak(self.vision_model(pixel_values=pixel_values).last_hidden_state, **options)


def _spoken(decoder: Any, tokens: Tensor, *, start: int, **options: Any) -> Tensor:
    return decoder.generate(
        input_ids=torch.full((len(tokens), 1), start, device=tokens.device),
        # A decoder by itself would be given a cache of its own tokens only; this one caches the picture's too.
        cache=EncoderDecoderCache(DynamicCache(), DynamicCache()),
        encoder_hidden_states=tokens,
        encoder_attention_mask=torch.ones(tokens.shape[:2], dtype=torch.long, device=tokens.device),
        **options,
    )


def unit(values: Tensor) -> Tensor:
    """Vectors of length one, in float32 or wider."""
    return F.normalize(values.to(torch.promote_types(values.dtype, torch.float32)), dim=-1)


def as_tokens(found: Any) -> Tensor:
    """A picture tower's last states as (n, t, width); the grid of a convolutional one row by row."""
    states = found.last_hidden_state
    return states.flatten(2).transpose(1, 2) if states.dim() == 4 else states


def register() -> None:
    """Let transformers' Auto classes find the two models; done on import, and by whoever loads a folder by its config
    alone."""
    for config, model in ((JointConfig, JointModel), (BlipJointConfig, BlipJointModel)):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, model, exist_ok=True)


def compose_joint(dual: Any, processor: Any, folder: Path, *, layers: int, seed: int = 0) -> Path:
    """Write a `JointModel` over a dual encoder to `folder` (a new one) and return it.

    The decoder starts as the first `layers` layers of the text tower, with its token table, where the tower's family
    has a decoder with cross-attention (BERT and its kin); otherwise as a small BERT of the tower's width. The new
    cross-attention and heads start at random (`seed`). Raises BackboneError for a tokenizer that puts no start and end
    token around a text.
    """
    tokenizer = processor.tokenizer
    start, end = _around(tokenizer)
    text = dual.config.text_config
    decoder = decoder_config(text, layers=layers)
    config = JointConfig(
        dual=dual.config.to_dict(),
        decoder=decoder.to_dict(),
        start_token_id=start,
        end_token_id=end,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = JointModel(config)
    model.dual.load_state_dict(dual.state_dict())
    if type(decoder) is type(text):
        theirs, ours = dual.text_model.state_dict(), model.decoder.base_model.state_dict()
        fitting = {key: value for key, value in theirs.items() if key in ours and ours[key].shape == value.shape}
        model.decoder.base_model.load_state_dict(fitting, strict=False)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def compose_blip(retrieval: Any, captioner: Any, processor: Any, folder: Path) -> Path:
    """Write a `BlipJointModel` of a `BlipForImageTextRetrieval` and the decoder of a `BlipForConditionalGeneration`
    (whose own picture tower is left behind) to `folder` and return it."""
    model = BlipJointModel(BlipJointConfig(**retrieval.config.to_dict()))
    model.load_state_dict(retrieval.state_dict(), strict=False)
    model.text_decoder.load_state_dict(captioner.text_decoder.state_dict())
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def decoder_config(text: Any, *, layers: int) -> Any:
    """Config of a decoder with cross-attention that is made like a text tower."""
    if hasattr(text, "add_cross_attention") or text.model_type in ("bert", "roberta", "xlm-roberta", "camembert"):
        values = {key: value for key, value in text.to_dict().items() if key not in ("model_type", "dtype")}
        values |= {"is_decoder": True, "add_cross_attention": True, "num_hidden_layers": layers}
        return type(text)(**values)
    return BertConfig(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=text.num_attention_heads,
        intermediate_size=text.intermediate_size,
        max_position_embeddings=text.max_position_embeddings,
        pad_token_id=text.pad_token_id,
        is_decoder=True,
        add_cross_attention=True,
    )


def _around(tokenizer: Any) -> tuple[int, int]:
    ids = tokenizer("a")["input_ids"]
    special = set(tokenizer.all_special_ids)
    if len(ids) < 3 or ids[0] not in special or ids[-1] not in special:
        raise BackboneError(
            f"the tokenizer writes 'a' as {ids}, without a start and an end token",
            where=type(tokenizer).__name__,
            allowed="a tokenizer that puts one special token before and one behind a text",
            do="take a dual encoder with a BERT or CLIP tokenizer, or give the tokenizer such a template",
        )
    return ids[0], ids[-1]


register()
