"""Locked towers: what a tower that is not trained says of an input is computed once (LiT, Zhai et al. 2022, arXiv
2111.07991), for all steps, epochs and evaluations of a run.

    towers = lock_towers(model)        # raises where every tower is trained
    towers[0].hits, towers[0].misses   # rows looked up and rows computed

A row's address is the sha256 of its own input tensors, without padding, and of the precision it is computed in. A
changed picture (an augmented one) or text is another row, so an answer can never be a stale one; at worst it is never
asked for twice. Kept are the tower's pooled outputs (a text's first token too, which some models project; `whole`: all
states), in memory, at most `bound` bytes, and on a `disk` that other runs share. Rows that find no room are computed
each time. Projections and scale stay outside, so that they may be trained.

Price: a row is computed by itself, not in a batch, so that its features are the same bits in every order of the data,
on any number of processes and after a resume. That is slower once (about two times on a CPU) and free afterwards.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmft.errors import BackboneError, RecipeError
from mmft.objectives.contrastive_embed import Side, embed, sides, unwrapped

BOUND = 1 << 30
"""Bytes of features that one tower may keep: 350,000 texts of width 384 in float32."""
_TOWERS: dict[Side, str] = {"image": "vision_model", "audio": "audio_model", "text": "text_model"}


class Disk(Protocol):
    """Where answers are kept beyond this process, by a hex sha256."""

    def get(self, key: str) -> Mapping[str, Tensor] | None:
        """The tensors, or None."""
        ...

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> bool:
        """Whether there was room."""
        ...


class LockedTower:
    """One tower's memory. It stands in for the tower's `forward` until `release`. `keep_on` gives it a disk, with the
    digest of all that an answer depends on beside the row."""

    def __init__(self, tower: nn.Module, side: Side, *, bound: int = BOUND, whole: bool = False) -> None:
        self.tower, self.side, self.bound, self.whole = tower, side, bound, whole
        self.disk: Disk | None = None
        self.space = b""
        self.hits = self.misses = self.bytes = 0
        self._kept: dict[bytes, dict[str, Tensor]] = {}
        self._forward: Callable[..., Any] = tower.forward
        self._names = list(inspect.signature(tower.forward).parameters)
        tower.forward = self  # type: ignore[assignment]

    def keep_on(self, disk: Disk, space: str) -> None:
        """Look on a disk for what is not in memory, and keep there what is computed."""
        self.disk, self.space = disk, space.encode()

    def release(self) -> None:
        """Give the tower its own forward back."""
        if self.tower.__dict__.get("forward") is self:
            del self.tower.forward
        self._kept.clear()

    def __call__(self, *args: Any, **named: Any) -> Any:
        """The tower's `pooler_output`, and of a text the first token's state as `last_hidden_state`; known rows are not
        computed again."""
        given = {**dict(zip(self._names, args, strict=False)), **named}
        tensors = {key: value for key, value in given.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in given.items() if key not in tensors}
        found = []
        for row in _rows(tensors, text=self.side == "text"):
            mark = address(row)
            answer = self._kept.get(mark) or self._stored(mark, row)
            if answer is None:
                self.misses += 1
                with torch.no_grad():
                    answer = self._told(self._forward(**row, **others))
                self._keep(mark, answer)
                if self.disk is not None:
                    self.disk.put(self._key(mark), answer)
            else:
                self.hits += 1
            found.append(answer)
        told: dict[str, Any] = {key: torch.cat([answer[key] for answer in found]) for key in found[0]}
        return BaseModelOutputWithPooling(**told)

    def _key(self, mark: bytes) -> str:
        return hashlib.sha256(self.space + mark).hexdigest()

    def _stored(self, mark: bytes, row: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The answer on the disk, in memory too from then on where that has room."""
        found = None if self.disk is None else self.disk.get(self._key(mark))
        if found is None:
            return None
        where = next(iter(row.values())).device
        answer = {key: value.clone() if value.device == where else value.to(where) for key, value in found.items()}
        self._keep(mark, answer)
        return answer

    def _told(self, out: Any) -> dict[str, Tensor]:
        """What is kept of a row, each a copy: the tower may have given a view of more."""
        told = {"pooler_output": out.get("pooler_output") if self.whole else out.pooler_output}
        if self.whole or self.side == "text":
            told["last_hidden_state"] = out.last_hidden_state if self.whole else out.last_hidden_state[:, :1]
        return {key: value.clone() for key, value in told.items() if value is not None}

    def _keep(self, mark: bytes, answer: dict[str, Tensor]) -> None:
        size = sum(value.numel() * value.element_size() for value in answer.values())
        if self.bytes + size <= self.bound:
            self._kept[mark] = answer
            self.bytes += size


def _rows(inputs: Mapping[str, Tensor], *, text: bool) -> Iterator[dict[str, Tensor]]:
    """Each row by itself, (1, ...); a text without the padding behind it, which a mask keeps from being read."""
    mask = inputs.get("attention_mask") if text else None
    for number in range(len(next(iter(inputs.values())))):
        row = {key: value[number : number + 1] for key, value in inputs.items()}
        if mask is not None and mask.dim() == 2:
            last = int(mask[number].nonzero().max()) + 1
            row = {key: value[:, :last] if value.shape[1:] == mask.shape[1:] else value for key, value in row.items()}
        yield row


def address(row: Mapping[str, Tensor]) -> bytes:
    """sha256 of a row's values by name, type and shape, and of the precision they are computed in."""
    digest = hashlib.sha256(f"{torch.is_autocast_enabled('cpu')} {torch.is_autocast_enabled('cuda')}".encode())
    for key, value in sorted(row.items()):
        one = value.detach().cpu().contiguous()
        digest.update(f"{key} {one.dtype} {tuple(one.shape)}".encode())
        digest.update(one.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def lock_towers(model: nn.Module, *, bound: int = BOUND) -> list[LockedTower]:
    """Lock every tower on which nothing is trained.

    Raises RecipeError when all towers are trained, BackboneError for a tower whose features are more than a function of
    its pooled output.
    """
    base = unwrapped(model)
    towers: dict[Side, nn.Module] = {side: getattr(base, _TOWERS[side]) for side in sides(model)}
    trained = {
        side: [name for name, value in tower.named_parameters() if value.requires_grad]
        for side, tower in towers.items()
    }
    free = [side for side, names in trained.items() if not names]
    if not free:
        told = "; ".join(f"{side}: {len(names)} tensors, such as {names[0]}" for side, names in trained.items())
        raise RecipeError(
            f"cache_features keeps what a tower that is not trained says, and every tower is trained ({told})",
            where="objective.cache_features",
            allowed="a tower without adapters, by adapter.targets or adapter.exclude",
            do="take one tower out of adapter.targets, or take cache_features out",
        )
    return [LockedTower(towers[side], side, bound=bound) for side in free]


@torch.no_grad()
def check_locked(model: nn.Module, tower: LockedTower, inputs: Mapping[str, Tensor]) -> None:
    """Raise BackboneError unless the locked side's features are what they are without memory, bit for bit, on some real
    inputs of one row."""
    try:
        found = [embed(model, inputs, tower.side) for _ in range(2)]
    except (TypeError, AttributeError):  # the accessor reads what is not kept, such as every token's state
        found = []
    del tower.tower.forward
    plain = embed(model, inputs, tower.side)
    tower.tower.forward = tower  # type: ignore[assignment]
    if not found or not all(torch.equal(one, plain) for one in found):
        raise BackboneError(
            f"the {tower.side} features of {type(unwrapped(model)).__name__} are more than a function of the tower's "
            "pooled output",
            where="objective.cache_features",
            do="take cache_features out",
        )
