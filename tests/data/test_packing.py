"""Packs: the rows of a step and nothing else, within the budget, the same on every world size; the line they become."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mmft.data.loader import batches
from mmft.data.order import StepPlan, Together
from mmft.data.packing import PackedRenderer, PackPlan, RowSizes, first_fit_decreasing, pack, row_sizes, shown_alike
from mmft.data.render import IGNORED, Rendered, Renderer
from tests.data.small import processor, sample
from tests.data.test_loader import same


def sizes_of(tokens: list[int], media: list[int] | None = None, shown: list[int] | None = None) -> RowSizes:
    count = len(tokens)
    pictures = np.array(media or [0] * count)
    return RowSizes(np.array(tokens), pictures, 5 * pictures, np.array(shown or [-1] * count))


def random_plan(seed: int, *, world: int = 1, layout: str = "packs", share: bool = False) -> PackPlan:
    """A plan over random lengths; it depends on `seed` but for its world."""
    source = random.Random(seed)
    rows = source.randint(3, 60)
    tokens = [source.choice((source.randint(6, 40), source.randint(6, 400))) for _ in range(rows)]
    media = [source.randint(0, 1) for _ in range(rows)]
    shown = [source.randint(0, 5) if one else -1 for one in media]
    plan = StepPlan(rows, source.randint(1, 4), 4 * source.randint(1, 2), world, seed)
    return PackPlan.of(plan, sizes_of(tokens, media, shown), layout=layout, share=share)


def test_first_fit_decreasing_by_hand():
    sizes = [(6, 1), (3, 1), (5, 0), (4, 1), (2, 0), (11, 0)]
    # 11 is beyond the limit and alone; 6+4; 5+3+2; in the order of their first items
    assert first_fit_decreasing(sizes, (10, 9)) == [[0, 3], [1, 2, 4], [5]]
    assert first_fit_decreasing(sizes, (10, 1)) == [[0, 4], [1], [2, 3], [5]]  # one picture each


@pytest.mark.parametrize("layout", ["packs", "buckets"])
@pytest.mark.parametrize("share", [False, True])
def test_a_step_keeps_its_rows(layout, share):
    for seed in range(60):
        plan = random_plan(seed, layout=layout, share=share)
        for step in range(3):
            packs = plan.packs(step)
            assert sorted(row for one in packs for row in one) == sorted(plan.step_rows(step))
            assert 1 <= len(packs) <= plan.micro_per_step and all(packs)


def test_a_pack_keeps_within_the_budget():
    fewer = 0
    for seed in range(60):
        plan = random_plan(seed)
        tokens, media = plan.limits
        for step in range(3):
            packs = plan.packs(step)
            fewer += plan.micro_per_step - len(packs)
            for one in packs:
                assert sum(plan.sizes.tokens[row] for row, _ in one) <= tokens
                assert sum(plan.sizes.media[row] for row, _ in one) <= media
    assert fewer > 60


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_has_the_same_number_of_forwards(world):
    for seed in range(40):
        plan = random_plan(seed, world=world)
        for step in range(3):
            parts = [plan.micro_batches(step, rank) for rank in range(world)]
            assert len({len(one) for one in parts}) == 1 and parts[0]
            rows = [row for part in parts for micro in part for row in micro.rows]
            assert sorted(rows) == sorted(random_plan(seed).step_rows(step))


def test_buckets_pad_less():
    plan = PackPlan.of(StepPlan(64, 4, 4, 1, 0), sizes_of([10 + 7 * (k % 13) for k in range(64)]), layout="buckets")

    def padding(one: StepPlan) -> int:
        lines = [[plan.sizes.tokens[row] for row, _ in one.micro_batch_at(0, index).rows] for index in range(4)]
        return sum(max(line) * len(line) - sum(line) for line in lines)

    assert 3 * padding(plan) < padding(StepPlan(64, 4, 4, 1, 0))


def test_rows_of_one_picture_share_a_pack_and_count_it_once():
    plan = PackPlan.of(StepPlan(8, 2, 4, 1, 0), sizes_of([20] * 8, [1] * 8, [0, 0, 0, 1, 1, 1, 2, 3]), layout="packs")
    shared = PackPlan.of(plan, plan.sizes, layout="packs", share=True)
    assert len(plan.packs(0)) == 4  # two rows of 20 in 40 tokens
    for one in shared.packs(0):
        groups = [int(plan.sizes.shown[row]) for row, _ in one]
        tokens = 20 * len(one) - 5 * (len(groups) - len(set(groups)))
        assert tokens <= 40 and len(set(groups)) <= 2


def test_half_the_micro_batch_halves_the_budget():
    """What the engine does when memory runs out: the same rows in more forwards."""
    plan = random_plan(3)
    plan = PackPlan.of(StepPlan(plan.rows, 4, 2, 1, 3), plan.sizes, layout="packs")
    whole, half = plan.packs(0), plan.halved().packs(0)
    assert plan.halved().limits[0] * 2 == plan.limits[0] and len(half) > len(whole)
    assert sorted(row for one in half for row in one) == sorted(plan.step_rows(0))


def test_rows_of_a_group_are_next_to_each_other():
    groups = np.array([0, 1, -1, 0, 1, 2, -1, 0])
    plan = StepPlan(8, 1, 8, 1, 5, None, Together(groups))
    plain = [row for row, _ in StepPlan(8, 1, 8, 1, 5).step_rows(0)]
    order = [row for row, _ in plan.step_rows(0)]
    assert sorted(order) == list(range(8)) and order != plain
    for group in (0, 1, 2):
        at = [k for k, row in enumerate(order) if groups[row] == group]
        assert at == list(range(at[0], at[0] + len(at)))
        assert [order[k] for k in at] == [row for row in plain if groups[row] == group]
    firsts = [next(k for k, row in enumerate(plain) if groups[row] == g) for g in (0, 1, 2)]
    found = [next(k for k, row in enumerate(order) if groups[row] == g) for g in (0, 1, 2)]
    assert np.argsort(firsts).tolist() == np.argsort(found).tolist()
    assert [plan.step_rows(step) for step in (0, 1)] != [plan.step_rows(1), plan.step_rows(0)]  # epochs differ


# ---------------------------------------------------------------- the line


def row(ids: list[int], target: int, name: str = "r", **media: torch.Tensor) -> Rendered:
    labels = torch.full((len(ids),), IGNORED)
    labels[target:] = torch.tensor(ids)[target:]
    return Rendered(name, torch.tensor(ids), labels, media, len(ids), 0)


def test_a_line_of_two_rows():
    batch = pack([row([5, 6, 7], 0, "a", pixels=torch.ones(1, 2)), row([8, 9], 1, "b", pixels=torch.zeros(2, 2))])
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch.inputs["attention_mask"].tolist() == [[[[0, 3, 0, 0], [3, 5, 0, 0]]]]
    assert batch.inputs["pixels"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED, 9]]  # the first token of a row is no target
    assert (batch.ids, batch.supervised, batch.tokens, batch.padding) == (("a", "b"), 3, 5, 0)


def test_a_line_is_filled_up_with_copies_of_its_last_token():
    rows = [row([5, 6, 7], 0, "a", kind=torch.tensor([[1, 1, 2]])), row([8, 9], 1, "b", kind=torch.tensor([[3, 4]]))]
    batch = pack(rows, multiple=4)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 9, 9, 9]]
    assert batch.inputs["kind"].tolist() == [[1, 1, 2, 3, 4, 4, 4, 4]]
    assert batch.inputs["attention_mask"].tolist() == [[[[0, 3, 0, 0], [3, 8, 0, 0]]]]  # behind the row: never seen
    assert batch.labels.tolist() == [[IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]]
    assert (batch.supervised, batch.tokens, batch.padding) == (3, 5, 3)
    assert pack(rows, multiple=5).padding == 0
    assert pack(rows, multiple=4, media_ids=torch.tensor([9])).padding == 0  # no picture without its features


def test_rows_of_one_picture_begin_together():
    ids = torch.tensor([9])
    first, second = row([1, 9, 9, 4, 5, 6], 4, "a"), row([1, 9, 9, 4, 7, 8], 4, "b")
    batch = pack([first, row([1, 2], 1, "c"), second], shown=[0, -1, 0], media_ids=ids)
    # [1 9 9 4] would be common, but 4 stands before a target: it has to lie in each rest
    assert batch.inputs["input_ids"].tolist() == [[1, 9, 9, 4, 5, 6, 4, 7, 8, 1, 2]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 5, 0, 1]]
    table = [[0, 3, 0, 0], [3, 6, 0, 3], [6, 9, 0, 3], [9, 11, 0, 0]]
    assert batch.inputs["attention_mask"][0, 0].tolist() == table
    assert batch.labels[0].tolist() == [*[IGNORED] * 4, 5, 6, IGNORED, 7, 8, IGNORED, 2]
    assert batch.supervised == 5 and batch.tokens == 14


@pytest.mark.parametrize(
    "other",
    [row([1, 9, 9, 4, 9, 6], 5), row([2, 9, 9, 4, 5, 6], 4), row([1, 9, 9, 4, 5, 6], 1)],
    ids=["a picture in the rest", "another beginning", "a target in the beginning"],
)
def test_what_is_not_shared(other):
    batch = pack([row([1, 9, 9, 4, 5, 6], 4), other], shown=[0, 0], media_ids=torch.tensor([9]))
    assert batch.inputs["attention_mask"][0, 0].tolist() == [[0, 6, 0, 0], [6, 12, 0, 0]]


# ---------------------------------------------------------------- the loader

ROWS = [sample(f"Where is the dog {k * 'x'}?", "top left", images=k % 3, seed=k, id=f"r{k}") for k in range(11)]


@pytest.mark.parametrize("kind", ["llava", "idefics3"])
def test_workers_and_a_late_start_change_nothing(kind):
    renderer = Renderer(processor(kind), max_length=4096)
    sizes = row_sizes(renderer, ROWS)
    for at, one in enumerate(ROWS):
        rendered = renderer.render(one)
        assert sizes.tokens[at] == len(rendered.input_ids)
        assert sizes.media_tokens[at] >= rendered.media_tokens  # idefics3 puts marks around a picture's tiles
    plan = PackPlan.of(StepPlan(11, 2, 3, 1, 4), sizes, layout="packs")
    packed = PackedRenderer(renderer)

    def run(start: int = 0, workers: int = 0):
        return list(batches(ROWS, packed, plan, start_step=start, stop_step=5, rank=0, workers=workers, pad_token_id=0))

    whole, late, ahead = run(), run(start=3), run(workers=2)
    assert [len(step) for step in whole] == [len(plan.packs(step)) for step in range(5)]
    for found, wanted in ((late, whole[3:]), (ahead, whole)):
        for one, two in zip(found, wanted, strict=True):
            assert all(same(a, b) for a, b in zip(one, two, strict=True))


def test_rows_with_the_same_pictures_are_alike():
    one, two = sample("a", "b", images=1, seed=1), sample("c", "d", images=1, seed=1)
    three, bare = sample("a", "b", images=2, seed=1), sample("a", "b", images=0)
    assert shown_alike([one.media, bare.media, two.media, three.media, bare.media]).tolist() == [0, -1, 0, 1, -1]
