"""Rows of preferences: a prompt with pictures, and answers to it that were compared, ranked, scored or thumbed.

One dialect, `preference`, reads what is in use, told apart by their keys:

| layout | keys |
|---|---|
| pairs (TRL, RLAIF-V) | `prompt`, `question` or `messages`; `chosen`, `rejected`: texts or messages |
| TRL, prompt within | `chosen`, `rejected` as whole conversations that begin alike |
| RLHF-V | `text`: JSON with `question`, `chosen`, `rejected` |
| LLaVA-RLHF | `conversations`, `output_1`, `output_2`, `preference` (1 or 2) |
| LLaMA-Factory | `instruction`, `input` or `conversations`; `chosen`, `rejected` |
| rankings | a prompt; `answers` with `scores` (higher is better) or `ranking` (1 is best) |
| thumbs (TRL) | a prompt, `completion`, `label` |
| thumbs (LLaMA-Factory) | `messages` or `conversations` with `kto_tag` or `label` |

Pictures: `images` or `image`; `chosen_images`, `rejected_images` where a side has its own. Scores of a pair:
`chosen_score`, `rejected_score` (also `score_chosen`, ...), or `margin`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmft.data.dialects import RowContext, parse_messages
from mmft.data.references import media_reference
from mmft.data.sample import Candidate, MediaRef, Sample, says_nothing
from mmft.data.turns import MAX_CHARS
from mmft.errors import DataError

PREFERENCE = "preference"
PLACEHOLDER = "<image>"
_LISTS = ("answers", "completions", "responses")
_LABELS = ("kto_tag", "label")
_PROMPTS = ("prompt", "messages", "conversations", "question", "instruction", "text")
Answer = tuple[str, dict[str, Any]]
"""A text and what else is known of it: fields of `Candidate`, `media` still as the row gives them."""


def looks_like_preferences(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most of the rows have the keys of one of the layouts."""
    return 2 * sum(_layout(row) is not None for row in rows) > len(rows)


def _layout(row: Mapping[str, Any]) -> str | None:
    if "chosen" in row and "rejected" in row:
        return "pair"
    if "output_1" in row and "output_2" in row and "preference" in row:
        return "outputs"
    if any(name in row for name in _LISTS) and ("scores" in row or "ranking" in row):
        return "ranking"
    if ("completion" in row and "label" in row) or (
        any(name in row for name in ("messages", "conversations")) and any(name in row for name in _LABELS)
    ):
        return "thumb"
    text = row.get("text")
    if isinstance(text, str) and text.lstrip().startswith("{") and '"chosen"' in text and '"rejected"' in text:
        return "pair"
    return None


def parse_preference(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """One row as a `Sample` whose turns end with the question and whose `candidates` stand best first.

    `answers` is the best candidate's text (nothing for a thumb down). Raises DataError for a row of no known layout, a
    prompt or answer that is no text, and answers that nothing tells apart.
    """
    layout = _layout(row)
    if layout is None:
        raise DataError(
            f"the row holds no preference; its keys are {', '.join(map(str, sorted(row)[:12])) or 'none'}",
            where=where,
            allowed="chosen and rejected; answers with scores or ranking; completion and label; messages and kto_tag",
        )
    if layout == "pair" and "chosen" not in row:
        row = {**row, **_object(row["text"], where)}
    prompt = _prompt(row, where)
    read = {"pair": _pair, "outputs": _outputs, "ranking": _ranking, "thumb": _thumb}[layout]
    prompt, answers = read(row, prompt, where)
    images = _listed(row.get("images", row.get("image")))
    plain = {name: row[name] for name in ("id", "tags") if name in row}
    last = {"role": "assistant", "content": answers[0][0]}
    whole = {**plain, "messages": [*_placed(prompt, len(images)), last], "images": images}
    sample = parse_messages(whole, where, number, context)
    candidates = tuple(_candidate(answer, sample, where, context) for answer in answers)
    best = candidates[0]
    return dataclasses.replace(
        sample,
        turns=sample.turns[:-1],
        candidates=candidates,
        answers=() if best.good is False else (best.text,),
    )


# ---------------------------------------------------------------- the prompt


def _prompt(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages before the answers; empty where they stand in `chosen` itself."""
    name = next((name for name in _PROMPTS if row.get(name) not in (None, "")), None)
    if name is None:
        return []
    value = row[name]
    if name == "instruction" and isinstance(value, str) and isinstance(row.get("input"), str) and row["input"]:
        value = f"{value}\n{row['input']}"
    return [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value, name, where)


def _messages(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Messages with `role` and `content`, whichever of the two spellings they have."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise DataError(f"`{name}` is a {type(value).__name__}", where=where, allowed="a text or a list of messages")
    return [
        {"role": one.get("role", one.get("from")), "content": one.get("content", one.get("value"))} for one in value
    ]


def _placed(prompt: list[dict[str, Any]], images: int) -> list[dict[str, Any]]:
    """Pictures that no message mentions stand before the first question."""

    def mentions(content: Any) -> bool:
        if isinstance(content, str):
            return PLACEHOLDER in content
        return isinstance(content, list) and any(
            isinstance(piece, dict) and piece.get("type") in ("image", "image_url") for piece in content
        )

    if not images or any(mentions(one["content"]) for one in prompt):
        return prompt
    first = next((index for index, one in enumerate(prompt) if one["role"] in ("user", "human")), None)
    if first is None:
        return prompt
    content = prompt[first]["content"]
    pieces = [{"type": "text", "text": content}] if isinstance(content, str) else content
    marks = [{"type": "image"} for _ in range(images)]
    changed = {**prompt[first], "content": [*marks, *pieces] if isinstance(pieces, list) else pieces}
    return [*prompt[:first], changed, *prompt[first + 1 :]]


# ---------------------------------------------------------------- the answers


def _pair(
    row: Mapping[str, Any], prompt: list[dict[str, Any]], where: str
) -> tuple[list[dict[str, Any]], list[Answer]]:
    sides = [row["chosen"], row["rejected"]]
    if not prompt:
        prompt, sides = _split(sides, where)
    answers: list[Answer] = []
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        score = row.get(f"{name}_score", row.get(f"score_{name}"))
        own = row.get(f"{name}_images", row.get(f"{name}_image"))
        answers.append((_text(side, name, where), {"score": _number(score, name, where), "media": own}))
    if row.get("margin") is not None and answers[0][1]["score"] is None:
        answers[0][1]["score"], answers[1][1]["score"] = _number(row["margin"], "margin", where), 0.0
    same_pictures = answers[0][1]["media"] == answers[1][1]["media"]
    if answers[0][0] == answers[1][0] and same_pictures:
        raise DataError("chosen and rejected are the same text", where=where, do="take the row out")
    return prompt, answers


def _split(sides: list[Any], where: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """Two whole conversations as what they share and one answer each."""
    first, second = (_messages(side, name, where) for side, name in zip(sides, ("chosen", "rejected"), strict=True))
    shared = list(itertools.takewhile(lambda both: both[0] == both[1], zip(first, second, strict=False)))
    prompt = [one for one, _ in shared]
    while prompt and prompt[-1]["role"] not in ("user", "human"):
        prompt.pop()
    if not prompt:
        raise DataError("chosen and rejected do not begin with the same question", where=where, do="give a `prompt`")
    return prompt, [first[len(prompt) :], second[len(prompt) :]]


def _outputs(
    row: Mapping[str, Any], prompt: list[dict[str, Any]], where: str
) -> tuple[list[dict[str, Any]], list[Answer]]:
    if row["preference"] not in (1, 2, "1", "2"):
        raise DataError(f"`preference` is {row['preference']!r}", where=where, allowed="1 or 2")
    names = ("output_1", "output_2") if int(row["preference"]) == 1 else ("output_2", "output_1")
    texts = [_text(row[name], name, where) for name in names]
    if texts[0] == texts[1]:
        raise DataError("output_1 and output_2 are the same text", where=where, do="take the row out")
    return prompt, [(text, {}) for text in texts]


def _ranking(
    row: Mapping[str, Any], prompt: list[dict[str, Any]], where: str
) -> tuple[list[dict[str, Any]], list[Answer]]:
    name = next(name for name in _LISTS if name in row)
    by = "scores" if "scores" in row else "ranking"
    texts, marks = row[name], row[by]
    if not isinstance(texts, list) or not isinstance(marks, list) or len(texts) != len(marks) or len(texts) < 2:
        raise DataError(f"`{name}` and `{by}` are no lists of one length", where=where, allowed="two answers or more")
    values = [_number(mark, by, where) for mark in marks]
    if any(value is None for value in values):
        raise DataError(f"an entry of `{by}` is missing", where=where, allowed="a number for each answer")
    scores = [float(value) if by == "scores" else -float(value) for value in values if value is not None]
    order = sorted(range(len(texts)), key=lambda index: -scores[index])
    if scores[order[0]] == scores[order[-1]]:
        raise DataError("all answers are ranked the same", where=where, do="take the row out")
    return prompt, [(_text(texts[index], name, where), {"score": scores[index]}) for index in order]


def _thumb(
    row: Mapping[str, Any], prompt: list[dict[str, Any]], where: str
) -> tuple[list[dict[str, Any]], list[Answer]]:
    label = next(row[name] for name in _LABELS if name in row)
    known = {"true": True, "1": True, "false": False, "0": False}
    good = known.get(str(label).lower())
    if good is None:
        raise DataError(f"the label is {label!r}", where=where, allowed="true or false")
    if "completion" in row:
        return prompt, [(_text(row["completion"], "completion", where), {"good": good})]
    if not prompt or prompt[-1]["role"] not in ("assistant", "gpt", "model"):
        raise DataError("the last turn is not the assistant's", where=where, do="end the row with the answer")
    return prompt[:-1], [(_text(prompt[-1:], "messages", where), {"good": good})]


# ---------------------------------------------------------------- small things


def _candidate(answer: Answer, sample: Sample, where: str, context: RowContext) -> Candidate:
    text, known = answer
    media: tuple[MediaRef, ...] | None = None
    if known.get("media") is not None:
        media = tuple(media_reference(one, context.root, where) for one in _listed(known["media"]))
        if len(media) != len(sample.media):
            raise DataError(
                f"an answer has {len(media)} picture(s) of its own, the row {len(sample.media)}",
                where=where,
                allowed="as many as the prompt has places",
            )
    return Candidate(text=text, score=known.get("score"), good=known.get("good"), media=media)


def _text(value: Any, name: str, where: str) -> str:
    """An answer: a text, one message, a list with one message, or pieces of text."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict) and "type" not in value[0]:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("content", value.get("value"))
    if isinstance(value, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in value):
        value = "".join(str(one.get("text", "")) for one in value)
    if not isinstance(value, str) or says_nothing(value):
        kind = "empty" if isinstance(value, str) else "missing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"`{name}` is {kind}", where=where, allowed="one answer: a text or one message")
    if PLACEHOLDER in value or len(value) > MAX_CHARS:
        problem = f"holds {PLACEHOLDER}" if PLACEHOLDER in value else f"has {len(value)} characters"
        raise DataError(f"`{name}` {problem}", where=where, allowed=f"text of at most {MAX_CHARS} characters")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"`{name}` holds half a surrogate pair", where=where) from error
    return value


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value or abs(value) == float("inf"):
        raise DataError(f"the score of `{name}` is {value!r}", where=where, allowed="a finite number")
    return float(value)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise DataError(f"`text` is no JSON: {error}", where=where) from error
    if not isinstance(found, dict):
        raise DataError(f"`text` holds a {type(found).__name__}", where=where, allowed="an object")
    return found


def _listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ---------------------------------------------------------------- what objectives learn from


def as_pairs(sample: Sample) -> list[Sample]:
    """A row as pairs, better answer first: every two of its candidates that are not scored alike. Thumbs give none."""
    ranked = sample.candidates
    found = [
        dataclasses.replace(sample, candidates=(better, worse), answers=(better.text,))
        for better, worse in itertools.combinations(ranked, 2)
        if better.score is None or worse.score is None or better.score > worse.score
    ]
    if len(found) < 2:
        return found
    return [dataclasses.replace(one, id=f"{one.id}#{index}") for index, one in enumerate(found, 1)]


def as_thumbs(sample: Sample) -> list[Sample]:
    """A row as thumbs: of a pair the first answer is good, the second bad; of more only the best and the worst."""
    if len(sample.candidates) < 2:
        return [sample]
    sides = ((sample.candidates[0], True, "+"), (sample.candidates[-1], False, "-"))
    return [
        dataclasses.replace(
            sample,
            id=f"{sample.id}{mark}",
            candidates=(dataclasses.replace(one, good=good),),
            answers=(one.text,) if good else (),
        )
        for one, good, mark in sides
    ]
