"""Dual learning: picture to text and text to picture trained together, tied by a consistency term.

    loss = w * contrastive + caption + c * consistency

One direction is the captioner, p(y | x), which writes texts; the other finds pictures, Q(x_i | y) = softmax over the
micro-batch's pictures of t s(x_i, y), which the contrastive term trains. With x_1..x_n the pictures, y_j a text and
P(j) the pictures it belongs to, the consistency term is one of

- `duality`: dual supervised learning (Xia et al. 2017, arXiv 1707.00415, eq. 3). Both directions describe one joint
  distribution, so `log p(x) + log p(y|x) = log p(y) + log p(x|y)`; what differs is squared. The marginals are the
  batch's: p(x_i) = 1/n and p(y) = 1/n sum_i p(y | x_i), for pictures are not modelled. Then the captioner's own
  p(x_i | y) is `A(i | j) = softmax_i log p(y_j | x_i)`, and the term is
  `mean_j (log sum_{i in P(j)} A(i | j) - log sum_{i in P(j)} Q(i | j))^2`, the paper's for one picture to a text.
- `cycle`: the closed loop of dual learning (He et al. 2016, arXiv 1611.00179, algorithm 1), both ways round.
  Picture to text to picture: a caption c is sampled from p(. | x_i), and its reward r = log sum_{k in P(i)} Q(x_k | c)
  is that it finds its picture; `-r - (r - b) log p(c | x_i)` trains the finder by r itself and the captioner by
  REINFORCE, b being the mean reward of the batch's other captions (self-retrieval as a reward: Liu et al. 2018, arXiv
  1803.08314).
  Text to picture to text: the loop over found pictures is summed instead of sampled,
  `- sum_i Q(x_i | y_j) log p(y_j | x_i) / tokens of y_j`. The term is the sum of the two means.

One adapter in the picture tower serves both directions; the text tower's serves only the finding, the decoder's only
the writing, so that targets without `vision` train one adapter for each direction.

Price: the table log p(y_j | x_i) takes one decoder forward of texts x pictures rows for a micro-batch (16 to 32 rows
are usual), `cycle` also a sampled caption for each picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmft.data.pairs import EXTRA
from mmft.objectives.contrastive import Kind
from mmft.objectives.contrastive_embed import similarity
from mmft.objectives.joint import JointObjective, Looked, Words, by_picture, caption_count, log_likelihoods, partners
from mmft.objectives.joint_heads import Heads
from mmft.seeds import fold

Form = Literal["duality", "cycle"]
FORMS: dict[str, tuple[str, ...]] = {"duality": ("duality",), "cycle": ("there", "back")}
"""The terms that each form of the consistency is the sum of."""
_ROWS_AT_ONCE = 512
"""Decoder rows in one forward of the table."""


def caption_table(heads: Heads, looked: Looked, texts: Tensor) -> Tensor:
    """(texts, pictures): log p(y_j | x_i) for every one of `texts` and every picture of the micro-batch."""
    words, tokens = looked.words, looked.seen.tokens

    def rows_of(part: Tensor) -> Tensor:
        rows = torch.arange(len(tokens), device=tokens.device).repeat(len(part))
        columns = part.repeat_interleave(len(tokens))
        found = log_likelihoods(heads, tokens[rows], words.ids[columns], words.mask[columns])
        return found.reshape(len(part), len(tokens))

    # In slices: without gradients (an evaluation's larger batches) only one of them is in memory.
    return torch.cat([rows_of(part) for part in texts.split(max(1, _ROWS_AT_ONCE // len(tokens)))])


def found_pictures(heads: Heads, pictures: Tensor, texts: Tensor) -> Tensor:
    """(texts, pictures): log Q(x_i | y_j)."""
    return (similarity(pictures, texts).T * heads.scale().right).log_softmax(dim=1)


def duality_terms(table: Tensor, finder: Tensor, own: Tensor) -> Tensor:
    """(texts,) squared gaps of the two directions' log p(own pictures | text); `own` (texts, pictures) is P(j)."""
    return (_inside(table.log_softmax(dim=1), own) - _inside(finder, own)) ** 2


def back_terms(table: Tensor, finder: Tensor, lengths: Tensor) -> Tensor:
    """(texts,) text to picture to text: the expected nats of a token over the pictures found."""
    return -(finder.exp() * table).sum(dim=1) / lengths


def there_terms(reward: Tensor, written: Tensor) -> Tensor:
    """(pictures,) picture to text to picture; `written` are log p(c | x_i) of the sampled captions."""
    others = (reward.sum() - reward) / max(len(reward) - 1, 1)
    return -reward - (reward - others).detach() * written


def _inside(values: Tensor, own: Tensor) -> Tensor:
    return values.masked_fill(~own, float("-inf")).logsumexp(dim=1)


class DualObjective(JointObjective):
    """The loss of the module's docstring; `weights`: `contrastive`, `caption` and `consistency`."""

    name = "dual"

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: Mapping[str, float],
        form: Form = "duality",
        kind: Kind = "infonce",
        seed: int = 0,
    ) -> None:
        given = {name: weight for name, weight in weights.items() if name != "consistency"}
        self.form: Form = form
        super().__init__(model, weights=given, kind=kind, seed=seed)
        self.consistent = float(weights.get("consistency", 0.0))
        if self.consistent:
            self.weights |= dict.fromkeys(FORMS[form], self.consistent)
            self.metrics |= {name: (name, "count") for name in FORMS[form]}
            if form == "cycle":
                self.metrics["returned"] = ("returned", "count")

    def needs(self) -> list[str]:
        """Both directions, whatever they weigh."""
        return ["contrastive", "caption"]

    def counts(self, words: Words) -> dict[str, int]:
        """Captions by tokens, gaps and ways back by texts, ways there by pictures."""
        texts = len(partners(words.left_groups, words.groups)[1])
        found = {"caption": caption_count(words), "duality": texts, "back": texts}
        return {**found, "there": int((words.left_groups != EXTRA).sum())}

    def sums(self, heads: Heads, looked: Looked, *, seed: int) -> dict[str, Tensor]:
        """Without consistency the caption term alone; else all from one table."""
        if not self.consistent:
            return super().sums(heads, looked, seed=seed)
        words = looked.words
        pictures, texts = partners(words.left_groups, words.groups)
        table = caption_table(heads, looked, texts)
        finder = found_pictures(heads, looked.seen.embeds, looked.texts[texts])
        places = torch.arange(len(texts), device=texts.device)
        found = {"caption": by_picture(-table[places, pictures], pictures, looked)}
        if self.form == "duality":
            own = words.groups[texts][:, None] == words.left_groups[None, :]
            found["duality"] = by_picture(duality_terms(table, finder, own), pictures, looked)
        else:
            lengths = words.mask[texts][:, 1:].sum(dim=1)
            found["back"] = by_picture(back_terms(table, finder, lengths), pictures, looked)
            found |= self._there(heads, looked, seed=seed)
        return found

    def _there(self, heads: Heads, looked: Looked, *, seed: int) -> dict[str, Tensor]:
        """A sampled caption for each picture: its terms, and how many captions find their picture first."""
        words = looked.words
        real = (words.left_groups != EXTRA).nonzero()[:, 0]
        tokens = looked.seen.tokens[real]
        ids, mask = sampled_captions(heads, tokens, words, seed=fold(seed, "speak"))
        torch.manual_seed(fold(seed, "spoken"))
        finder = found_pictures(heads, looked.seen.embeds, heads.read(ids, mask))
        own = words.left_groups[real][:, None] == words.left_groups[None, :]
        terms = there_terms(_inside(finder, own), log_likelihoods(heads, tokens, ids, mask))
        hits = own.gather(1, finder.argmax(dim=1, keepdim=True)).sum()
        return {"there": by_picture(terms, real, looked), "returned": hits}


def sampled_captions(heads: Heads, tokens: Tensor, words: Words, *, seed: int) -> tuple[Tensor, Tensor]:
    """(ids, mask) of one caption for each picture, drawn from p(. | x) itself, no longer than the batch's longest
    text; the first token is the one the tokenizer puts there."""
    limit = words.ids.shape[1] - 1
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, "num_beams": 1}
    ids = heads.speak(tokens.detach(), max_new_tokens=limit, **options).clone()
    ends = (ids[:, 1:] == heads.end).long().cumsum(dim=1)
    before = torch.cat([torch.zeros_like(ids[:, :2]), ends[:, :-1]], dim=1)
    ids[:, 0] = words.ids[0, 0]
    return ids, (before[:, : ids.shape[1]] == 0).long()
