"""Text, labels and media of a row: equal to the processor's own chat template and to the slow prefix method."""

from __future__ import annotations

import dataclasses
import pickle
import random

import pytest
import torch

from mmft.data.masks import AnswerSpans, expand, prefix_spans, token_spans
from mmft.data.media import open_image
from mmft.data.render import IGNORED, Renderer, TooLongError, messages_of
from mmft.data.sample import MediaRef, Piece, Sample, Turn
from mmft.errors import DataError
from tests.data.small import CHATML, LLAVA15, MARKED, encoded, picture, processor, sample

KINDS = ("llava", "llava_bos", "idefics3", "qwen2_vl", "mllama")
SIX = [text for i in range(6) for text in (f"Where is the dog {i}?", f"top left {i}")]
ROWS = {
    "one": lambda: sample("What is it?", "a cat"),
    "six": lambda: sample(*SIX),
    "system": lambda: sample(*SIX, system="Be kind."),
    "two images": lambda: sample(*SIX, images=2),
    "text only": lambda: sample("hello", "yes there", images=0),
    "white space": lambda: sample(" What?\n", " a cat \n", "x ", "  y"),
    "same texts": lambda: sample("cat", "cat", "cat", "cat"),
    "unicode": lambda: sample("Où est 🐈?", "là-bas 日本", "e\u0301", "🐈‍⬛"),
}


def native(proc, row: Sample, **options):
    """The processor's own tokenize=True path."""
    messages = messages_of(row.turns)
    pictures = iter([open_image(ref, max_pixels=10**9) for ref in row.media])
    for message in messages:
        for piece in message["content"]:
            if piece["type"] == "image":
                piece["image"] = next(pictures)
    return proc.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt", **options)


def trained_text(proc, rendered) -> str:
    return proc.tokenizer.decode(rendered.labels[rendered.labels != IGNORED])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_ids_and_media_equal_the_chat_template_and_labels_the_slow_way(kind, row):
    proc, one = processor(kind), ROWS[row]()
    renderer = Renderer(proc, max_length=4096)
    fast, slow, expected = renderer.render(one), renderer.render_slowly(one), native(proc, one)
    assert torch.equal(fast.input_ids, expected["input_ids"][0])
    assert fast.media.keys() == expected.keys() - {"input_ids", "attention_mask"}
    for name, value in fast.media.items():
        assert torch.equal(value, expected[name]), name
    assert torch.equal(fast.labels, slow.labels)
    kept = fast.labels != IGNORED
    assert torch.equal(fast.labels[kept], fast.input_ids[kept])
    assert renderer.length(one) == len(fast.input_ids) == fast.text_tokens + fast.media_tokens


@pytest.mark.parametrize(
    ("kind", "end"), [("llava", "<|im_end|>"), ("idefics3", "<end_of_utterance>"), ("mllama", "<|eot_id|>")]
)
def test_what_is_trained_is_the_answers_and_their_ends(kind, end):
    proc = processor(kind)
    rendered = Renderer(proc, max_length=4096).render(sample("What is it?", "a cat", "Where?", "top left"))
    lead = " " if kind == "idefics3" else ""  # its template writes "Assistant:" and then " a cat"
    assert trained_text(proc, rendered) == f"{lead}a cat{end}{lead}top left{end}"


@pytest.mark.parametrize("kind", KINDS)
def test_last_answer_only(kind):
    proc = processor(kind)
    rendered = Renderer(proc, max_length=4096, supervise="last_answer").render(sample(*SIX))
    assert "top left 5" in trained_text(proc, rendered)
    assert "top left 4" not in trained_text(proc, rendered)


@pytest.mark.parametrize("template", [MARKED, LLAVA15])
def test_generation_markers_change_nothing(template):
    proc, one = processor("llava", template), sample(*SIX)
    renderer = Renderer(proc, max_length=4096)
    fast = renderer.render(one)
    assert torch.equal(fast.labels, renderer.render_slowly(one).labels)
    masked = native(proc, one, return_assistant_tokens_mask=True)
    by_marker = torch.as_tensor(masked["assistant_masks"]).view(-1).bool()
    mine = fast.labels != IGNORED
    if template == MARKED:  # the markers enclose answer and end-of-turn token
        assert torch.equal(mine, by_marker)
    else:  # white space at the answer's borders belongs to neither or both
        assert trained_text(proc, fast).split() == proc.tokenizer.decode(fast.input_ids[by_marker]).split()


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_is_the_conversation_before_the_last_answer(kind):
    proc, one = processor(kind), sample(*SIX)
    prompt = Renderer(proc, max_length=4096).prompt(one)
    before = dataclasses.replace(one, turns=one.turns[:-1])
    expected = native(proc, before, add_generation_prompt=True)
    assert torch.equal(prompt.input_ids, expected["input_ids"][0])
    assert bool((prompt.labels == IGNORED).all())
    full = Renderer(proc, max_length=4096).render(one)
    first = int((full.labels != IGNORED).nonzero()[-1])
    assert torch.equal(full.input_ids[: len(prompt.input_ids)], prompt.input_ids) and first >= len(prompt.input_ids)


def test_pictures_between_answers_take_the_slow_way_and_agree():
    turns = []
    for k in range(3):
        turns += [
            Turn("user", (Piece("text", f"look {k}"), Piece("image"), Piece("text", "what?"))),
            Turn("assistant", (Piece("text", f"a cat {k}"),)),
        ]
    media = tuple(MediaRef(data=encoded(picture(k))) for k in range(3))
    one = Sample("x", tuple(turns), media)
    for kind in KINDS:
        proc = processor(kind)
        renderer = Renderer(proc, max_length=4096)
        fast = renderer.render(one)
        assert torch.equal(fast.labels, renderer.render_slowly(one).labels)
        assert [f"a cat {k}" in trained_text(proc, fast) for k in range(3)] == [True] * 3
        assert "what" not in trained_text(proc, fast)


def test_the_pictures_of_a_row_are_processed_once(monkeypatch):
    proc = processor("llava")
    renderer = Renderer(proc, max_length=4096)
    renderer.render(sample(*SIX))  # learns the layout of the image processor's tensors
    seen = []
    original = type(proc.image_processor).__call__
    monkeypatch.setattr(
        type(proc.image_processor), "__call__", lambda self, *a, **k: (seen.append(1), original(self, *a, **k))[1]
    )
    renderer.render(sample(*SIX))
    assert len(seen) == 1


def test_a_template_that_looks_at_texts_falls_back_to_real_prefixes():
    template = CHATML.replace("{{ p.text }}", "{{ p.text | replace('dog', 'DOGGY') }}")
    proc, one = processor("llava", template), sample(*SIX, "And the dog?", "the dog is here")
    renderer = Renderer(proc, max_length=4096)
    fast = renderer.render(one)
    assert torch.equal(fast.labels, renderer.render_slowly(one).labels)
    assert "the DOGGY is here<|im_end|>" in trained_text(proc, fast)


def test_a_template_without_prefixes_is_refused_with_a_reason():
    template = "{{ messages | length }}" + CHATML
    with pytest.raises(DataError, match="does not render turn 2 as an extension") as caught:
        Renderer(processor("llava", template), max_length=4096).render(sample("a", "b"))
    assert "rows.jsonl:1 (id a)" in str(caught.value) and "do" in str(caught.value)


def test_no_chat_template():
    proc = processor("llava")
    bare = type(proc)(proc.image_processor, proc.tokenizer, patch_size=32)
    with pytest.raises(DataError, match="no chat template"):
        Renderer(bare, max_length=8)


def test_a_placeholder_written_into_a_text_is_refused():
    with pytest.raises(DataError, match="refused the row") as caught:
        Renderer(processor("llava"), max_length=4096).render(sample("look <image> here", "yes"))
    assert "special tokens" in str(caught.value)


def test_media_tokens_never_carry_loss():
    for kind in KINDS:
        proc = processor(kind)
        rendered = Renderer(proc, max_length=4096).render(sample(*SIX, images=2))
        assert bool((rendered.labels[rendered.input_ids == proc.image_token_id] == IGNORED).all())


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_too_long_rows(policy):
    renderer = Renderer(processor("llava"), max_length=60, over_length=policy)
    one = sample(*SIX)
    assert not renderer.fits(one) and renderer.fits(sample("What is it?", "a cat"))
    with pytest.raises(TooLongError, match=f"has {renderer.length(one)} tokens") as caught:
        renderer.render(one)
    assert "at most 60" in str(caught.value)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), TooLongError)


@pytest.mark.parametrize("kind", KINDS)
def test_truncate_text_property(kind):
    """Whatever is cut: at most max_length, no picture touched, an answer left whole, and cut no more than needed."""
    proc, rng = processor(kind), random.Random(7)
    words = ["the", "quick", "brown", "dog", "cat", "top", "left", "12", "🐈", "?"]
    wide = Renderer(proc, max_length=10**6)
    for trial in range(12):
        turns = rng.choice([1, 2, 4])
        texts = [" ".join(rng.choices(words, k=rng.randint(1, 40 if k % 2 == 0 else 4))) for k in range(2 * turns)]
        one = sample(*texts, images=trial % 3, system=rng.choice([None, "Be kind."]), seed=trial)
        full = wide.render(one)
        limit = rng.randint(20, len(full.input_ids) + 5)
        renderer = Renderer(proc, max_length=limit, over_length="truncate_text")
        try:
            cut = renderer.render(one)
        except TooLongError:
            first = dataclasses.replace(
                one, turns=tuple(turn for turn in one.turns if turn.role == "system")
                + (Turn("user", (*(Piece("image"),) * len(one.media), Piece("text", ""))), one.turns[-2 * turns + 1]),
            )  # fmt: skip
            assert wide.length(first) > limit
            continue
        assert len(cut.input_ids) <= limit
        assert cut.media_tokens == full.media_tokens
        assert texts[1].strip() in trained_text(proc, cut)
        if len(full.input_ids) <= limit:
            assert torch.equal(cut.input_ids, full.input_ids) and torch.equal(cut.labels, full.labels)
        slow = renderer.render_slowly(one)
        assert torch.equal(slow.labels, cut.labels)


def test_truncate_text_drops_trailing_turns_before_it_cuts_a_question():
    proc, one = processor("llava"), sample(*SIX)
    three = Renderer(proc, max_length=4096).length(dataclasses.replace(one, turns=one.turns[:6]))
    cut = Renderer(proc, max_length=three, over_length="truncate_text").render(one)
    assert torch.equal(cut.input_ids, Renderer(proc, max_length=4096).render(
        dataclasses.replace(one, turns=one.turns[:6])).input_ids)  # fmt: skip


def test_truncate_text_uses_the_room_there_is():
    proc, one = processor("llava"), sample("the dog " * 100, "a cat")
    cut = Renderer(proc, max_length=100, over_length="truncate_text").render(one)
    assert 98 <= len(cut.input_ids) <= 100


def test_a_long_prompt():
    one = sample("the dog " * 100, "a cat")
    with pytest.raises(TooLongError):
        Renderer(processor("llava"), max_length=100).prompt(one)
    cut = Renderer(processor("llava"), max_length=100, over_length="truncate_text").prompt(one)
    assert 98 <= len(cut.input_ids) <= 100


def test_pictures_shrink_until_the_row_fits():
    proc, one = processor("qwen2_vl"), sample("What is it?", "a cat", images=2, size=(112, 84))
    whole = Renderer(proc, max_length=10**6).render(one)
    floor = Renderer(proc, max_length=10**6).length(sample("What is it?", "a cat", images=2, size=(16, 16)))
    assert floor < len(whole.input_ids)
    for limit in (len(whole.input_ids), len(whole.input_ids) - 1, (len(whole.input_ids) + floor) // 2, floor):
        renderer = Renderer(proc, max_length=limit, over_length="shrink_images")
        shown = renderer.render(one)
        assert len(shown.input_ids) <= limit and shown.text_tokens <= whole.text_tokens
        assert trained_text(proc, shown) == trained_text(proc, whole)
        assert torch.equal(renderer.render_slowly(one).labels, shown.labels)
        assert torch.equal(renderer.render(one).input_ids, shown.input_ids)
        assert (len(shown.input_ids) == len(whole.input_ids)) == (limit == len(whole.input_ids))
    with pytest.raises(TooLongError):
        Renderer(proc, max_length=floor - 8, over_length="shrink_images").render(one)


def test_shrinking_helps_nothing_where_every_picture_has_as_many_tokens():
    one = sample("What is it?", "a cat")
    length = Renderer(processor("llava"), max_length=10**6).length(one)
    with pytest.raises(TooLongError, match="the row has"):
        Renderer(processor("llava"), max_length=length - 1, over_length="shrink_images").render(one)


def test_a_row_without_an_answer_is_refused():
    one = dataclasses.replace(sample("a", "b"), turns=sample("a", "b").turns[:1])
    with pytest.raises(DataError, match="does not end with an answer"):
        Renderer(processor("llava"), max_length=4096).render(one)


def test_an_answer_that_the_template_swallows_is_refused():
    template = CHATML.replace("<|im_end|>\n{% endfor %}", "{% endfor %}").replace("{{ p.text }}", "{{ p.text | trim }}")
    with pytest.raises(DataError, match="no token of the row carries loss"):
        Renderer(processor("llava", template), max_length=4096).render(sample("a", " "))


def test_spans_in_tokens():
    offsets = [(0, 0), (0, 3), (3, 5), (5, 9), (9, 9), (9, 12)]
    assert token_spans(offsets, [(3, 5), (9, 12)]) == [(2, 3), (5, 6)]
    short, long = [1, 9, 2, 3, 4], [1, 9, 9, 9, 2, 3, 4]
    assert expand([(3, 5)], short, long) == [(5, 7)]
    assert expand([(0, 1)], short, long) == [(0, 1)]
    two, wide = [1, 9, 2, 9, 3], [1, 9, 9, 2, 9, 9, 3]
    assert expand([(2, 3)], two, wide) is None  # between two media: the slow way decides


def test_learned_literals_agree_with_prefixes_on_random_rows():
    proc, rng = processor("llava"), random.Random(1)
    renderer = Renderer(proc, max_length=10**6)
    finder = AnswerSpans(renderer.text)
    for _ in range(40):
        texts = ["".join(rng.choices("ab \n<|>🐈", k=rng.randint(1, 6))) or "x" for _ in range(2 * rng.randint(1, 4))]
        one = sample(*[text if text.strip() else "x" for text in texts], images=rng.randint(0, 1))
        text = renderer.text(one.turns)
        assert finder(one.turns, text) == prefix_spans(renderer.text, one.turns, text)


def test_the_fast_way_costs_less_than_a_third_of_the_slow_one():
    """A ratio of CPU times, because milliseconds depend on who else is on the machine."""
    import time

    renderer, one = Renderer(processor("llava"), max_length=4096), sample(*SIX, size=(192, 192))

    def cost(work) -> float:
        work(one)
        start = time.process_time()
        for _ in range(15):
            work(one)
        return time.process_time() - start

    assert 3 * cost(renderer.render) < cost(renderer.render_slowly)


@pytest.mark.parametrize("kind", ["audio", "video"])
def test_other_media_than_pictures_are_refused_by_name(kind):
    one = sample("What?", "a cat")
    one = dataclasses.replace(one, media=(MediaRef(kind, data=b"x"),))
    renderer = Renderer(processor("llava"), max_length=4096)
    for work in (renderer.render, renderer.prompt, renderer.length):
        with pytest.raises(DataError, match=f"takes no {kind}[\\s\\S]*rows.jsonl:1"):
            work(one)
