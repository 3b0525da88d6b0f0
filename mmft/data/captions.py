"""Captions for encoder-decoders and picture-conditioned decoders: rows of pairs become batches.

One rule for all: the decoder reads `input[i]` and is to say `labels[i]`. An encoder-decoder reads its start token and
then the caption (the shift of the model's own `labels`), a decoder reads the prompt (with the picture's placeholders,
where its processor makes some) and then the caption. Loss stands on the caption with its end token, never on the
prompt.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmft.data.collate import Batch
from mmft.data.media import open_image
from mmft.data.pairs import draw_texts, open_medium
from mmft.data.render import IGNORED, OverLength, Rendered
from mmft.data.sample import MediaRef, Sample
from mmft.data.sounds import open_audio
from mmft.errors import BackboneError, DataError

DECODER_IDS = "decoder_input_ids"
PromptPlace = Literal["encoder", "decoder"]
_LENGTHS = ("max_target_positions", "max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class CaptionShape:
    """How a model takes text, read off its class and config.

    `text` is the input that holds the decoder's tokens; `start` its first token, `pad` what fills it up; `prompt` says
    who reads a prompt; `accepts` are the names of its forward's parameters; `longest` is the decoder's last position.
    """

    text: str
    start: int | None
    pad: int
    prompt: PromptPlace
    accepts: frozenset[str]
    longest: int | None = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether the caption goes into a decoder of its own."""
        return self.text == DECODER_IDS


def caption_shape(cls: Any, config: Any) -> CaptionShape:
    """The shape of a model by its class and config.

    Raises BackboneError for one that takes no tokens, or whose decoder has no start token.
    """
    accepts = frozenset(inspect.signature(cls.forward).parameters)
    inner = getattr(config, "decoder", None) or getattr(config, "text_config", None) or config
    holders = [config, inner] if not isinstance(inner, dict) else [config]

    def told(*names: str) -> int | None:
        values = (getattr(holder, name, None) for name in names for holder in holders)
        return next((int(value) for value in values if isinstance(value, int)), None)

    longest = next((value for name in _LENGTHS if isinstance(value := getattr(holders[-1], name, None), int)), None)
    if DECODER_IDS in accepts and bool(getattr(config, "is_encoder_decoder", False)):
        # A composed model reads its own config alone: in that of its decoder stands what that family begins with.
        own = getattr(config, "decoder_start_token_id", None)
        start = own if getattr(config, "decoder", None) is inner else told("decoder_start_token_id")
        pad = told("pad_token_id")
        if start is None:
            raise BackboneError(
                f"{cls.__name__} has no decoder_start_token_id: its decoder does not know how a caption begins",
                where="config.json",
                do="set decoder_start_token_id (a BERT decoder's [CLS], a GPT-2's bos token) and pad_token_id",
            )
        place: PromptPlace = "encoder" if "input_ids" in accepts else "decoder"
        return CaptionShape(DECODER_IDS, start, start if pad is None else pad, place, accepts, longest)
    if "input_ids" not in accepts:
        raise BackboneError(
            f"{cls.__name__} takes no tokens, so it cannot learn captions",
            where="model.name_or_path",
            allowed="vision-encoder-decoder, git, blip, florence2, pix2struct, whisper and their kin",
            do="choose a model that writes text",
        )
    bos, pad = told("bos_token_id"), told("pad_token_id")
    return CaptionShape("input_ids", bos, 0 if pad is None else pad, "decoder", accepts, longest)


def decoder_config(config: Any) -> Any:
    """The config of what writes the text; it has `hidden_size`, `num_hidden_layers` and `vocab_size`."""
    inner = getattr(config, "decoder", None)
    return config.get_text_config(decoder=True) if inner is None or isinstance(inner, dict) else inner


class CaptionRenderer:
    """Pairs to batches with a processor (or an image processor or feature extractor with a tokenizer).

    `captions`: how many captions of a picture a step sees, drawn by (seed, epoch, id); 0 means all, each a row of its
    own. `prompt` is a text before the caption: in the encoder (Florence-2), in the picture's header (Pix2Struct for
    questions), else in the decoder. `max_length` counts the decoder's tokens without picture placeholders. Raises
    DataError for a processor without a tokenizer or without what opens pictures or sound.
    """

    def __init__(
        self,
        processor: Any,
        shape: CaptionShape,
        *,
        max_length: int,
        over_length: OverLength = "error",
        max_image_pixels: int = 40_000_000,
        captions: int = 0,
        prompt: str = "",
        seed: int = 0,
    ) -> None:
        self.processor = processor
        self.tokenizer: Any = getattr(processor, "tokenizer", None)
        self.image_processor: Any = getattr(processor, "image_processor", None)
        self.feature_extractor: Any = getattr(processor, "feature_extractor", None)
        if self.tokenizer is None or (self.image_processor is None and self.feature_extractor is None):
            raise DataError(
                "captions need a tokenizer, and an image processor or feature extractor",
                where=type(processor).__name__ if processor is not None else "no processor",
                do="put the processor's files into the model folder",
            )
        self.shape = shape
        self.max_length = min(max_length, shape.longest or max_length)
        self.over_length: OverLength = over_length
        self.max_image_pixels = max_image_pixels
        self.captions = captions
        self.prompt = prompt
        self.seed = seed
        self._lead, self._trail = self._frame()
        self._header = bool(getattr(self.image_processor, "is_vqa", False))

    # -- text -------------------------------------------------------------------------------------------------------

    @property
    def end(self) -> int:
        """The token that ends a caption."""
        return self._trail[0]

    def _frame(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind a text; the end token where it puts none."""
        plain = self._ids("a")
        whole = list(self.tokenizer("a")["input_ids"])
        at = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), None)
        lead, trail = ([], []) if at is None else (whole[:at], whole[at + len(plain) :])
        if not trail:
            ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id)
            trail = [next((int(one) for one in ends if one is not None), -1)]
        if trail[0] < 0:
            raise DataError(
                "the tokenizer has no end token: a caption could not end",
                where=type(self.tokenizer).__name__,
                do="set eos_token in the tokenizer's config",
            )
        if self.shape.encoder_decoder and lead and lead[0] == self.shape.start:
            lead = lead[1:]  # the shift puts it there
        return lead, trail

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _opening(self) -> list[int]:
        """The tokens before a caption in a decoder: the prompt, framed as the tokenizer does, without its end."""
        spoken = self.prompt if self.shape.prompt == "decoder" and not self._header else ""
        return [*self._lead, *(self._ids(spoken) if spoken else [])]

    def _caption(self, text: str, *, whole: bool = False) -> list[int]:
        """The caption's tokens with the end behind, cut (unless `whole`) to the length where the recipe allows it."""
        spoken = self.prompt if self.shape.prompt == "decoder" and not self._header else ""
        ids = self._ids(text)
        if spoken:
            before, both = self._ids(spoken), self._ids(f"{spoken} {text}")
            ids = both[len(before) :] if both[: len(before)] == before else ids
        if self.over_length == "truncate_text" and not whole:
            ids = ids[: max(1, self.max_length - len(self._opening()) - len(self._trail))]
        return [*ids, *self._trail]

    def length(self, sample: Sample) -> int:
        """Tokens of the row's longest caption before it is cut, prompt and end included."""
        return len(self._opening()) + max(len(self._caption(text, whole=True)) for text in sample.answers)

    def fits(self, sample: Sample) -> bool:
        """Whether every caption of the row has at most `max_length` tokens."""
        return self.length(sample) <= self.max_length

    def chosen(self, sample: Sample, epoch: int) -> list[str]:
        """The captions of a sample that an epoch sees, in the row's order."""
        return draw_texts(sample, self.captions, seed=self.seed, epoch=epoch)

    # -- batches ----------------------------------------------------------------------------------------------------

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> Batch:
        """The batch of (sample, epoch) rows. Raises DataError naming the row for a picture that cannot be read."""
        samples = [sample for sample, _ in rows]
        texts = [self.chosen(sample, epoch) for sample, epoch in rows]
        owner = [place for place, own in enumerate(texts) for _ in own]
        inputs = self._repeated(samples, owner)
        spoken = [self._caption(text) for own in texts for text in own]
        opening, per_token = self._head_of(inputs)
        said = [[*opening, *ids] for ids in spoken]
        if self.shape.encoder_decoder:
            lead = len(self._lead)  # what the tokenizer puts in front is said; a prompt is given
            told = [*opening[:lead], *[IGNORED] * (len(opening) - lead)]
            read = [[int(self.shape.start or 0), *ids[:-1]] for ids in said]
            labels = [[*told, *ids] for ids in spoken]
        else:
            read = [ids[:-1] for ids in said]
            labels = [[*[IGNORED] * (len(opening) - 1), *ids] for ids in spoken]
        longest = max(map(len, read))
        inputs[self.shape.text] = _padded(read, longest, fill=self.shape.pad)
        targets = _padded(labels, longest, fill=IGNORED)
        if not self.shape.encoder_decoder:
            if "attention_mask" in self.shape.accepts:
                inputs["attention_mask"] = _padded([[1] * len(ids) for ids in read], longest, fill=0)
            for name, value in per_token.items():
                inputs[name] = torch.cat((value, value.new_zeros(len(value), longest - value.shape[1])), 1)
        tokens = sum(map(len, read))
        return Batch(
            inputs=inputs,
            labels=targets,
            ids=tuple(sample.id for sample in samples),
            supervised=int((targets != IGNORED).sum()),
            tokens=tokens,
            padding=targets.numel() - tokens,
            counted=tuple(
                (samples[place].source, count)
                for place, count in zip(owner, (targets != IGNORED).sum(1).tolist(), strict=True)
            ),
        )

    def render(self, sample: Sample) -> Rendered:
        """One row to look at: the decoder's tokens, with a caption of the first epoch, and labels where it speaks."""
        opening, caption = self._opening(), self._caption(self.chosen(sample, 0)[0])
        media = self._media([sample])
        if not self.shape.encoder_decoder:
            opening, _ = self._head_of(media)
            said = [*[IGNORED] * len(opening), *caption]
        else:
            said = [IGNORED, *opening[: len(self._lead)], *[IGNORED] * (len(opening) - len(self._lead)), *caption]
            opening = [int(self.shape.start or 0), *opening]
        ids = torch.tensor([*opening, *caption])
        return Rendered(sample.id, ids, torch.tensor(said), media, text_tokens=len(ids), media_tokens=0)

    def prompts(self, samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], list[int]]:
        """What generation starts from: the inputs, and the tokens that the answer will be preceded by."""
        inputs = self._media(samples)
        opening, per_token = self._head_of(inputs)
        count = len(samples)
        if self.shape.encoder_decoder:
            begin = [int(self.shape.start or 0), *opening[len(self._lead) :]]
            if len(begin) > 1:
                inputs[DECODER_IDS] = torch.tensor([begin] * count)
            return inputs, begin
        inputs[self.shape.text] = torch.tensor([opening] * count)
        if "attention_mask" in self.shape.accepts:
            inputs["attention_mask"] = torch.ones(count, len(opening), dtype=torch.int64)
        return {**inputs, **per_token}, opening

    def _head_of(self, inputs: dict[str, torch.Tensor]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """The tokens before the caption, and further tensors that have an entry for each of them; a decoder's own
        tokens are taken out of `inputs`, which the processor has put there."""
        if self.shape.encoder_decoder:
            return self._opening(), {}
        ids = inputs.pop("input_ids")
        inputs.pop("attention_mask", None)
        width = ids.shape[1]
        sequences = [
            name for name, value in inputs.items() if value.shape[:2] == ids.shape and not value.is_floating_point()
        ]
        rows = ids.tolist()
        if any(row != rows[0] for row in rows):
            raise DataError(
                "the pictures of a batch take up different numbers of tokens",
                where=type(self.processor).__name__,
                allowed="captioners whose pictures all take up the same number of tokens",
                do="train this model on conversations: objective.name: sft",
            )
        opening: list[int] = rows[0]
        if opening[-len(self._trail) :] == self._trail:
            opening = opening[: -len(self._trail)]
        if self._lead and self.shape.start is not None and opening[:1] == self._lead[:1]:
            opening = [self.shape.start, *opening[1:]]  # BLIP's decoder begins with a token of its own
        if not opening and self.shape.start is not None:
            opening = [self.shape.start]
        cut = len(opening) - width
        return opening, {name: inputs.pop(name)[:, : cut or None] for name in sequences}

    # -- pictures and sound -----------------------------------------------------------------------------------------

    def _repeated(self, samples: Sequence[Sample], owner: Sequence[int]) -> dict[str, torch.Tensor]:
        """The media of row `owner[i]` for each caption i; a picture with several captions is opened once."""
        found = self._media(samples)
        if len(owner) == len(samples):
            return found
        if all(len(value) == len(samples) for value in found.values()):
            index = torch.tensor(owner)
            return {name: value[index] for name, value in found.items()}
        return self._media([samples[place] for place in owner])

    def _media(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """What the processor makes of the rows' pictures (or sound), with the prompt where it reads it."""
        opened = [open_medium(sample, self._opened) for sample in samples]
        try:
            found = self._processed(opened)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise DataError(
                f"the processor refused the rows: {type(error).__name__}: {error}",
                where=", ".join(itertools.islice((sample.where or sample.id for sample in samples), 5)),
                do="look at the sizes of the pictures or the lengths of the sounds",
            ) from error
        # A composed model hands on to its encoder what it does not know itself.
        passes_on = self.shape.encoder_decoder and "kwargs" in self.shape.accepts
        return {
            name: value
            for name, value in found.items()
            if isinstance(value, torch.Tensor) and (name in self.shape.accepts or passes_on)
        }

    def _opened(self, ref: MediaRef) -> Any:
        """An image, or mono samples at the feature extractor's rate."""
        wanted = "image" if self.image_processor is not None else "audio"
        if ref.kind != wanted:
            raise DataError(
                f"the row has a medium of kind {ref.kind}, and the model reads {wanted}",
                allowed=f"rows with {'an' if wanted == 'image' else 'a sound in'} `{wanted}`",
                do="take the row out, or choose another model",
            )
        if wanted == "image":
            return open_image(ref, max_pixels=self.max_image_pixels)
        return open_audio(ref, sampling_rate=int(self.feature_extractor.sampling_rate))

    def _processed(self, pictures: list[Any]) -> Mapping[str, Any]:
        if self.image_processor is None:
            # Whisper's window has one length; others are padded to the longest sound.
            padding = "max_length" if hasattr(self.feature_extractor, "n_samples") else True
            rate = int(self.feature_extractor.sampling_rate)
            return self.feature_extractor(pictures, sampling_rate=rate, padding=padding, return_tensors="pt")
        if self._header:
            return self.image_processor(pictures, header_text=[self.prompt] * len(pictures), return_tensors="pt")
        if self.shape.encoder_decoder and self.shape.prompt == "decoder":
            return self.image_processor(pictures, return_tensors="pt")
        text = [self.prompt] * len(pictures)
        return self.processor(images=pictures, text=text, padding=True, return_tensors="pt")


def _padded(rows: Sequence[Sequence[int]], width: int, *, fill: int) -> torch.Tensor:
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])
