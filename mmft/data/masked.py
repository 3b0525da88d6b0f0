"""Masked texts with their pictures: which tokens are hidden is a pure function of (seed, epoch, id).

After BERT (Devlin et al. 2019, arXiv 1810.04805, 3.1 and its code): of a text's tokens, special ones left out, 15 % are
chosen, at least one. A chosen token becomes the mask token in 80 % of the cases, a random word of the vocabulary in
10 %, and stays in 10 %; its label is what it was. The picture is whole (ViLT, Kim et al. 2021, arXiv 2102.03334, 3.2,
does it so; ViLT chooses whole words, here they are tokens, so that any tokenizer fits).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmft.data.collate import Batch
from mmft.data.pairs import PairRenderer
from mmft.data.render import IGNORED
from mmft.data.sample import Sample
from mmft.errors import DataError
from mmft.seeds import generator

SHARE = 0.15
MASKED, RANDOM = 0.8, 0.1


def hide(
    ids: Sequence[int], usable: Sequence[int], *, mask_token: int, words: Sequence[int], keys: Sequence[int | str]
) -> tuple[list[int], list[int]]:
    """(ids, labels) of a text with tokens hidden. `usable`: the places that may be hidden; `words`: what a random
    token is drawn from; `keys`: (seed, epoch, ...), which name the draw."""
    hidden, labels = list(ids), [IGNORED] * len(ids)
    if not usable:
        return hidden, labels
    first, *others = keys
    draw = generator(int(first), "masked", *others)
    number = max(1, round(len(usable) * SHARE))
    for place in sorted(draw.sample(list(usable), number)):
        labels[place] = ids[place]
        chance = draw.random()
        if chance < MASKED:
            hidden[place] = mask_token
        elif chance < MASKED + RANDOM:
            hidden[place] = words[draw.randrange(len(words))]
    return hidden, labels


class MaskedRenderer(PairRenderer):
    """Pairs to batches of pictures with one masked text each; a picture's texts take turns by (seed, epoch, id).

    Raises DataError for a tokenizer without a mask token.
    """

    def __init__(self, processor: Any, **options: Any) -> None:
        super().__init__(processor, **{**options, "captions": 1})
        if self.tokenizer.mask_token_id is None:
            raise DataError(
                "the tokenizer has no mask token",
                where=type(self.tokenizer).__name__,
                do="take a model with a masked language modelling head; its tokenizer has one",
            )
        special = set(self.tokenizer.all_special_ids)
        self.words = [number for number in range(len(self.tokenizer)) if number not in special]
        self.special = special

    def assemble(self, rows: Sequence[tuple[Sample, int]]) -> Batch:
        """The batch of (sample, epoch) rows: `labels` (B, T) hold what was hidden, IGNORED elsewhere."""
        texts = [self.chosen(sample, epoch)[0] for sample, epoch in rows]
        inputs = {**self.encode_images([sample for sample, _ in rows]), **self.encode_texts(texts)}
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        hidden, labels = torch.empty_like(ids), torch.empty_like(ids)
        for number, (sample, epoch) in enumerate(rows):
            line, real = ids[number].tolist(), mask[number].tolist()
            usable = [place for place, token in enumerate(line) if real[place] and token not in self.special]
            keys = (self.seed, epoch, sample.source, sample.id)
            one, label = hide(line, usable, mask_token=self.tokenizer.mask_token_id, words=self.words, keys=keys)
            hidden[number], labels[number] = torch.tensor(one), torch.tensor(label)
        tokens = int(mask.sum())
        return Batch(
            inputs={**inputs, "input_ids": hidden},
            labels=labels,
            ids=tuple(sample.id for sample, _ in rows),
            supervised=int((labels != IGNORED).sum()),
            tokens=tokens,
            padding=ids.numel() - tokens,
            counted=tuple(
                (sample.source, count)
                for (sample, _), count in zip(rows, (labels != IGNORED).sum(1).tolist(), strict=True)
            ),
        )
