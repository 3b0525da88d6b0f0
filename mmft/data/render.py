"""A `Sample` becomes token ids, labels and media tensors, by the processor's own chat template and nothing else.

The ids equal `processor.apply_chat_template(messages, tokenize=True, return_dict=True)`; loss stands on the answers and
the end-of-turn tokens behind them. The pictures of a row are processed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from jinja2 import TemplateError
from PIL import Image

from mmft.data.masks import AnswerSpans, Span, common_prefix, expand, prefix_spans, token_spans
from mmft.data.opened import Measure, MediaOpener, Opened, blank, measure_of
from mmft.data.pictures import Pictures
from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.data.shrink import Size, shrink
from mmft.data.templates import check_template, time_limit
from mmft.errors import DataError, MmftError

IGNORED = -100
OverLength = Literal["error", "drop", "truncate_text", "shrink_images"]
Supervise = Literal["answers", "last_answer"]
_TEXT_KEYS = ("input_ids", "attention_mask")
_T = TypeVar("_T")


class TooLongError(DataError):
    """A row is longer than `max_length`; with `over_length: drop` the caller counts it."""


@dataclass(frozen=True)
class Rendered:
    """One row as tensors.

    `input_ids` and `labels` are (T,) int64, labels -100 where no loss, not shifted. `media` is all else the processor
    returned, each tensor with its leading dimension: rows ((1, ...), named in `per_row`) or media ((count, ...)).
    `pictures` go to the tower by themselves; their pixels are then not in `media`. `source` names the row's data set.
    """

    id: str
    input_ids: torch.Tensor
    labels: torch.Tensor
    media: dict[str, torch.Tensor]
    text_tokens: int
    media_tokens: int
    per_row: frozenset[str] = frozenset()
    pictures: Pictures | None = None
    source: str = ""


class Renderer:
    """Renders samples with one processor; keeps small caches only, so it may be copied to loader workers.

    `supervise` names the answers with loss: all, or the last. Raises DataError where the processor has no chat
    template.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int,
        over_length: OverLength = "error",
        supervise: Supervise = "answers",
        max_image_pixels: int = 40_000_000,
        video_frames: int = 8,
    ) -> None:
        self.processor = processor
        self.max_length = max_length
        self.over_length: OverLength = over_length
        self.supervise: Supervise = supervise
        self.max_image_pixels = max_image_pixels
        self.opener = MediaOpener(processor, max_pixels=max_image_pixels, video_frames=video_frames)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self._chat_template = getattr(processor, "chat_template", None) or getattr(
            self.tokenizer, "chat_template", None
        )
        if not self._chat_template:
            raise DataError(
                "the processor has no chat template",
                where=type(processor).__name__,
                do="take an instruction-tuned checkpoint, or put a chat_template.jinja into the model folder",
            )
        self._place = f"chat_template of {getattr(self.tokenizer, 'name_or_path', '') or type(processor).__name__}"
        named = self._chat_template.values() if isinstance(self._chat_template, dict) else [self._chat_template]
        for template in named:
            check_template(template, where=self._place)
        self._answer_spans = AnswerSpans(self.text)
        self.media_ids = media_token_ids(processor)
        self._per_row: frozenset[str] | None = None
        self._gains: dict[Measure, int] = {}

    # -- the public verbs -------------------------------------------------------------------------------------------

    def render(self, sample: Sample) -> Rendered:
        """The whole conversation with labels, for training.

        Raises DataError naming the row: no answer, a bad medium, no loss anywhere; TooLongError when it has more than
        `max_length` tokens and may not (or cannot) be cut.
        """
        return self._guarded(sample, self._training)

    def prompt(self, sample: Sample) -> Rendered:
        """All before the last assistant turn, with the generation prompt behind it; labels all -100."""
        return self._guarded(sample, self._prompting)

    def render_slowly(self, sample: Sample) -> Rendered:
        """The plain twin of `render`: labels from the processor's ids of every beginning of the conversation.

        Costs two processor calls per answer; the fast way falls back to it, and tests compare the two.
        """
        return self._guarded(sample, lambda row: self._training(row, slow=True))

    def sibling(self, first: Rendered, sample: Sample, other: Sample) -> Rendered:
        """`render(other)`, where it has the media of the rendered `sample`, which are not processed again if all stand
        before the first difference. Falls back to `render` where ids and labels cannot be told from the texts."""
        return self._guarded(other, lambda row: self._sibling(first, sample, row)) or self.render(other)

    def length(self, sample: Sample) -> int:
        """Tokens of the row as `render` would make them, without decoding its pictures.

        The text is tokenised; how many tokens a picture of some size adds is measured once per size on a blank one
        (processors decide by size alone).
        """
        return self.sizes(sample)[0]

    def sizes(self, sample: Sample) -> tuple[int, int]:
        """(tokens, those of its pictures) of the row, as `length` counts."""
        return self._guarded(sample, self._sizes)

    def fits(self, sample: Sample) -> bool:
        """Whether the row is at most `max_length` tokens long."""
        return self.length(sample) <= self.max_length

    def text(self, turns: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The template's text, one placeholder per picture."""
        template = None if getattr(self.processor, "chat_template", None) else self._chat_template
        with time_limit(self._place):
            return self.processor.apply_chat_template(
                messages_of(turns), chat_template=template, tokenize=False, add_generation_prompt=add_generation_prompt
            )

    # -- how --------------------------------------------------------------------------------------------------------

    def _guarded(self, sample: Sample, work: Callable[[Sample], _T]) -> _T:
        """Run `work`, and say which row it was when it fails."""
        row = f"{sample.where or sample.source or 'row'} (id {sample.id})"
        try:
            return work(sample)
        except MmftError as error:
            raise type(error)([problem.within(row) for problem in error.problems]) from error
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError, TemplateError) as error:
            raise DataError(
                f"the processor refused the row: {type(error).__name__}: {error}",
                where=row,
                do="look for the model's own special tokens in the row's texts, and at the picture's shape",
            ) from error

    def _training(self, sample: Sample, *, slow: bool = False) -> Rendered:
        if not sample.turns or sample.turns[-1].role != "assistant":
            raise DataError("the row does not end with an answer", do="end the row with an assistant turn")
        media = self._media(sample.turns, sample.media, prompt=False)
        turns, text, data = self._encoded(sample.turns, media, prompt=False)
        ids = data["input_ids"][0].tolist()
        ranges = None if slow else self._fast_ranges(turns, text, ids)
        if ranges is None:
            ranges = self._slow_ranges(turns, text, ids, media)
        labels = torch.full((len(ids),), IGNORED, dtype=torch.int64)
        for start, end in ranges if self.supervise == "answers" else ranges[-1:]:
            labels[start:end] = data["input_ids"][0, start:end]
        rendered = self._rendered(sample, data, labels)
        if not bool((labels[1:] != IGNORED).any()):
            raise DataError(
                "no token of the row carries loss", do="remove the row; its answer has no tokens of its own"
            )
        return rendered

    def _sibling(self, first: Rendered, sample: Sample, other: Sample) -> Rendered | None:
        """Ids up to where the two texts part as they are, the rest from the text; None where that is not sure."""
        whole = first.input_ids.tolist()
        per_token = any(tuple(value.shape[:2]) == (1, len(whole)) for value in first.media.values())
        one = self.supervise == "last_answer" or sum(turn.role == "assistant" for turn in other.turns) == 1
        if not self.tokenizer.is_fast or per_token or not one:
            return None
        text = self.text(other.turns)
        before, _ = self._plain(self.text(sample.turns))
        short, offsets = self._plain(text)
        shared, gained = common_prefix(before, short), len(whole) - len(before)
        seen = int(torch.isin(first.input_ids[: shared + gained], self.media_ids).sum())
        if whole[shared + gained :] != before[shared:] or seen != first.media_tokens:
            return None
        ids = torch.cat((first.input_ids[: shared + gained], torch.tensor(short[shared:], dtype=torch.int64)))
        if len(ids) > self.max_length:
            return None
        start, end = token_spans(offsets, self._answer_spans(other.turns, text))[-1]
        labels = torch.full_like(ids, IGNORED)
        labels[start + gained : end + gained] = ids[start + gained : end + gained]
        if not bool((labels[1:] != IGNORED).any()):
            return None
        return dataclasses.replace(
            first,
            id=other.id,
            input_ids=ids,
            labels=labels,
            text_tokens=len(ids) - first.media_tokens,
            source=other.source,
        )

    def _prompting(self, sample: Sample) -> Rendered:
        turns = sample.turns[:-1] if sample.turns and sample.turns[-1].role == "assistant" else sample.turns
        if not turns:
            raise DataError("the row has no question", do="put a user turn before the answer")
        _, _, data = self._encoded(turns, self._media(turns, sample.media, prompt=True), prompt=True)
        return self._rendered(sample, data, torch.full_like(data["input_ids"][0], IGNORED))

    def _rendered(self, sample: Sample, data: dict[str, torch.Tensor], labels: torch.Tensor) -> Rendered:
        ids = data["input_ids"][0]
        is_media = torch.isin(ids, self.media_ids)
        labels[is_media] = IGNORED
        media = {name: value for name, value in data.items() if name not in _TEXT_KEYS}
        count = int(is_media.sum())
        rows = self._per_row_names() & media.keys() if sample.media else frozenset()
        return Rendered(sample.id, ids, labels, media, len(ids) - count, count, frozenset(rows), source=sample.source)

    def _media(self, turns: Sequence[Turn], media: Sequence[MediaRef], *, prompt: bool) -> list[Opened]:
        """The row's media; pictures all made smaller by one factor where the recipe asks for it and the row is too
        long."""
        opened = [self.opener.open(ref) for ref in media]
        images = [one for one in opened if isinstance(one, Image.Image)]
        if self.over_length != "shrink_images" or not images:
            return opened
        room = self.max_length - len(self._plain(self.text(turns, prompt))[0])
        room -= sum(self._gain(measure_of(one)) for one in opened if not isinstance(one, Image.Image))

        def fits(sizes: Sequence[Size]) -> bool:
            return sum(self._gain(("image", *size, 1)) for size in sizes) <= room

        small = iter(images if fits([image.size for image in images]) else shrink(images, fits) or images)
        return [next(small) if isinstance(one, Image.Image) else one for one in opened]

    def _encoded(
        self, turns: tuple[Turn, ...], media: list[Opened], *, prompt: bool
    ) -> tuple[tuple[Turn, ...], str, dict[str, torch.Tensor]]:
        """The turns (cut where the recipe allows it), their text, and the processor's tensors; at most max_length."""
        text = self.text(turns, prompt)
        data = self._process(text, media)
        length = data["input_ids"].shape[1]
        if length <= self.max_length:
            return turns, text, data
        if self.over_length == "truncate_text":
            turns = self._cut(turns, length - len(self._plain(text)[0]), prompt=prompt)
            text = self.text(turns, prompt)
            data = self._process(text, media)
            if data["input_ids"].shape[1] <= self.max_length:
                return turns, text, data
        raise TooLongError(
            f"the row has {length} tokens",
            allowed=f"at most {self.max_length} (data.max_length)",
            do="raise data.max_length, or set data.over_length to drop, truncate_text or shrink_images",
        )

    def _process(self, text: str, media: Sequence[Opened]) -> dict[str, torch.Tensor]:
        """The processor's tensors for a text with placeholders; `input_ids` has shape (1, T)."""
        keywords = self._specials(text) | self.opener.keywords(media)
        out = self.processor(text=[text], return_tensors="pt", **keywords)
        return {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}

    def _specials(self, text: str) -> dict[str, bool]:
        """The rule of `ProcessorMixin.apply_chat_template`: no second BOS when the template wrote one."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos is not None and text.startswith(bos) else {}

    def _plain(self, text: str) -> tuple[list[int], list[Span]]:
        """Ids and character offsets of the text with one placeholder per medium."""
        out = self.tokenizer(text, return_offsets_mapping=True, **self._specials(text))
        return out["input_ids"], out["offset_mapping"]

    def _fast_ranges(self, turns: tuple[Turn, ...], text: str, ids: list[int]) -> list[Span] | None:
        if not self.tokenizer.is_fast:
            return None
        short, offsets = self._plain(text)
        return expand(token_spans(offsets, self._answer_spans(turns, text)), short, ids)

    def _slow_ranges(self, turns: tuple[Turn, ...], text: str, ids: list[int], media: list[Opened]) -> list[Span]:
        spans = prefix_spans(self.text, turns, text)
        answers = [k for k, turn in enumerate(turns) if turn.role == "assistant"]
        tail = self._added_behind()
        ranges = []
        for k, (start, end) in zip(answers, spans, strict=True):
            seen = media[: sum(piece.kind != "text" for turn in turns[:k] for piece in turn.pieces)]
            edges = []
            for stop in (start, end):
                part = self._process(text[:stop], seen)["input_ids"][0].tolist()
                part = part[: len(part) - tail]
                edges.append((common_prefix(ids, part), len(part)))
            (first, before), (last, upto) = edges
            if before - first > 1 or upto - last > 1:
                raise DataError(
                    f"the tokens of the turns before answer {k + 1} change with what follows them",
                    do="use another chat template or tokenizer, or rows with one answer only",
                )
            ranges.append((first, last + (last < upto)))  # a token across the border belongs to the answer
        return ranges

    def _added_behind(self) -> int:
        """How many special tokens the tokenizer puts behind every text."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        return common_prefix(full[::-1], plain[::-1]) == 0 and len(full) - len(plain) or 0

    def _cut(self, turns: tuple[Turn, ...], gained: int, *, prompt: bool) -> tuple[Turn, ...]:
        """Shorter turns of at most max_length tokens: trailing question-answer pairs go first, then the ends of the
        longest user texts, by one cap in characters for all of them. Pictures and the last answer kept stay whole."""

        def excess(candidate: tuple[Turn, ...]) -> bool:
            return len(self._plain(self.text(candidate, prompt))[0]) + gained > self.max_length

        def pair_may_go() -> bool:
            answers = sum(turn.role == "assistant" for turn in turns)
            media = any(piece.kind != "text" for turn in turns[-2:] for piece in turn.pieces)
            return not prompt and answers > 1 and not media

        while excess(turns) and pair_may_go():
            turns = turns[:-2]
        low, high = 0, max((len(p.text) for t in turns if t.role == "user" for p in t.pieces), default=0)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (low, middle - 1) if excess(_capped(turns, middle)) else (middle, high)
        return _capped(turns, low)

    def _sizes(self, sample: Sample) -> tuple[int, int]:
        gained = sum(self._gain(self.opener.measure(ref)) for ref in sample.media)
        return len(self._plain(self.text(sample.turns))[0]) + gained, gained + len(sample.media)

    def _gain(self, measure: Measure) -> int:
        """Tokens that a medium adds to its one placeholder."""
        if measure not in self._gains:
            one = (Turn("user", (Piece(measure[0]), Piece("text", "a"))),)
            data = self._process(self.text(one), [blank(measure)])
            self._gains[measure] = data["input_ids"].shape[1] - len(self._plain(self.text(one))[0])
        return self._gains[measure]

    def _per_row_names(self) -> frozenset[str]:
        """Names of the image processor's tensors whose first dimension counts rows, seen on one row of two pictures."""
        if self._per_row is None:
            blank = Image.new("RGB", (64, 64))
            try:
                out = self.processor.image_processor([[blank, blank]], return_tensors="pt")
                tensors = {name: value for name, value in out.items() if isinstance(value, torch.Tensor)}
                self._per_row = frozenset(name for name, value in tensors.items() if value.shape[:1] == (1,))
            except (ValueError, TypeError, AttributeError):
                self._per_row = frozenset()  # one picture per row only: both layouts are the same
        return self._per_row


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as the messages that chat templates read."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": piece.text} if piece.kind == "text" else {"type": piece.kind}
                for piece in turn.pieces
            ],
        }
        for turn in turns
    ]


def media_token_ids(processor: Any) -> torch.Tensor:
    """The ids that stand for media in expanded sequences, int64 (n,)."""
    found: set[int] = set()
    for name in ("image_token_id", "video_token_id", "audio_token_id"):
        value = getattr(processor, name, None)
        found |= {value} if isinstance(value, int) else set()
    for name in ("image_token_ids", "video_token_ids", "audio_token_ids"):
        found |= {value for value in getattr(processor, name, None) or () if isinstance(value, int)}
    return torch.tensor(sorted(found), dtype=torch.int64)


def _capped(turns: tuple[Turn, ...], cap: int) -> tuple[Turn, ...]:
    return tuple(
        Turn(turn.role, tuple(dataclasses.replace(piece, text=piece.text[:cap]) for piece in turn.pieces))
        if turn.role == "user"
        else turn
        for turn in turns
    )
