"""The dialects of rows: `messages`, LLaVA `conversations`, and `qa`; each one function from a row to a `Sample`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.data.references import media_reference
from mmft.data.sample import Piece, Role, Sample, Turn
from mmft.errors import DataError, choices

PLACEHOLDER = "<image>"
MAX_CHARS = 1_000_000
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_QA_FIELDS = ("image", "question", "answer", "answers", "id", "tags")


@dataclass(frozen=True)
class RowContext:
    """What a row's parser knows besides the row."""

    name: str
    root: Path
    columns: Mapping[str, str]
    system: str | None


def guess_format(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, where: str) -> str:
    """The dialect of most of the given rows (some may be bad); DataError when there is none."""

    def common(*groups: Sequence[str]) -> bool:
        fitting = sum(all(any(name in row for name in names) for names in groups) for row in rows)
        return 2 * fitting > len(rows)

    if common(["messages"]):
        return "messages"
    if common(["conversations"]):
        return "llava"
    question, answer = columns.get("question", "question"), columns.get("answer", "answer")
    if common([question], [answer, columns.get("answers", "answers")]):
        return "qa"
    keys = sorted({key for row in rows for key in row})
    raise DataError(
        f"the layout of the rows is not known; their keys are {', '.join(map(str, keys[:12])) or 'none'}",
        where=where,
        allowed="`messages` (+ `images`), `conversations` (+ `image`), or `question` and `answer` (+ `image`)",
        do="set data.train[].format, or data.train[].columns to name the question, answer and image columns",
    )


def parse_messages(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """`messages`: roles with text (`<image>` marks a picture) or lists of pieces; pictures inline or in `images`."""
    turns, inline = _turns(row.get("messages"), "messages", ("role", "content"), where)
    images = row.get("images", row.get("image"))
    return _sample(row, turns, _merge(inline, _listed(images), where), where, number, context)


def parse_llava(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """LLaVA: `conversations` of `from`/`value`, `image` a path or a list of paths."""
    turns, inline = _turns(row.get("conversations"), "conversations", ("from", "value"), where)
    images = row.get("image", row.get("images"))
    return _sample(row, turns, _merge(inline, _listed(images), where), where, number, context)


def parse_qa(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """`image, question, answer(s)`; a list of answers gives the references, its most common one is trained on."""
    field = {name: row.get(context.columns.get(name, name)) for name in _QA_FIELDS}
    question = field["question"]
    if not isinstance(question, str):
        raise DataError(f"the question is {_kind(question)}", where=where, allowed="a text")
    images = _listed(field["image"])
    answers = _answers(field["answers"] if field["answer"] is None else field["answer"], where)
    marks = question.count(PLACEHOLDER)
    pieces = _split(question) if marks else (*(Piece("image") for _ in images), Piece("text", question))
    turns = (Turn("user", pieces), Turn("assistant", (Piece("text", Counter(answers).most_common(1)[0][0]),)))
    merged = dict(row) | {"id": field["id"], "tags": field["tags"], "answers": answers if len(answers) > 1 else None}
    return _sample(merged, turns, _merge([None] * (marks or len(images)), images, where), where, number, context)


DIALECTS: dict[str, Callable[[Mapping[str, Any], str, int, RowContext], Sample]] = {
    "messages": parse_messages,
    "llava": parse_llava,
    "qa": parse_qa,
}


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def _split(text: str) -> tuple[Piece, ...]:
    """A text with `<image>` marks as pieces; the line break that LLaVA puts beside a mark goes with it."""
    pieces: list[Piece] = []
    for index, part in enumerate(text.split(PLACEHOLDER)):
        if index:
            pieces.append(Piece("image"))
            part = part.removeprefix("\n")
        if part:
            pieces.append(Piece("text", part))
    if len(pieces) > 1 and pieces[-1].kind == "image" and pieces[-2].kind == "text":
        pieces[-2] = Piece("text", pieces[-2].text.removesuffix("\n"))
    return tuple(piece for piece in pieces if piece.kind == "image" or piece.text)


def _turns(value: Any, field: str, keys: tuple[str, str], where: str) -> tuple[tuple[Turn, ...], list[Any]]:
    """The turns, and for every picture place its inline reference or None."""
    if not isinstance(value, list) or not value:
        raise DataError(f"`{field}` is {_kind(value) if not isinstance(value, list) else 'empty'}", where=where)
    turns: list[Turn] = []
    inline: list[Any] = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"`{field}[{index}]` is {_kind(message)}", where=where, allowed="an object")
        role, content = message.get(keys[0]), message.get(keys[1])
        if not isinstance(role, str) or role not in _ROLES:
            word = role if isinstance(role, str) else ""
            raise DataError(
                f"`{field}[{index}].{keys[0]}` is {role!r}", where=where, allowed=choices(_ROLES, word=word)
            )
        if isinstance(content, str):
            pieces = _split(content)
            inline.extend(None for piece in pieces if piece.kind == "image")
        elif isinstance(content, list):
            pieces = tuple(_piece(part, f"{field}[{index}].{keys[1]}", where, inline) for part in content)
        else:
            raise DataError(
                f"`{field}[{index}].{keys[1]}` is {_kind(content)}", where=where, allowed="a text or a list"
            )
        turns.append(Turn(_ROLES[role], pieces))
    return tuple(turns), inline


def _piece(part: Any, field: str, where: str, inline: list[Any]) -> Piece:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return Piece("text", part["text"])
    if kind in ("image", "image_url"):
        reference = next(
            (part[key] for key in ("image", "path", "url", "image_url") if part.get(key) is not None), None
        )
        inline.append(reference.get("url") if kind == "image_url" and isinstance(reference, dict) else reference)
        return Piece("image")
    raise DataError(
        f"`{field}` holds a piece of type {kind!r}", where=where, allowed="text (with `text`), image, image_url"
    )


def _listed(images: Any) -> list[Any]:
    if images is None or images == "":
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _merge(inline: list[Any], listed: list[Any], where: str) -> list[Any]:
    """The pictures in the order of their places: inline ones where given, the rest from the row's list."""
    places = sum(reference is None for reference in inline)
    if places != len(listed):
        raise DataError(f"{places} image placeholder(s) but {len(listed)} image(s)", where=where)
    rest = iter(listed)
    return [next(rest) if reference is None else reference for reference in inline]


def _answers(value: Any, where: str) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    texts = []
    for answer in listed:
        if isinstance(answer, dict):  # VQAv2 writes {"answer": ..., "answer_confidence": ...}
            answer = answer.get("answer")
        if isinstance(answer, (int, float)) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(answer, str):
            raise DataError(f"an answer is {_kind(answer)}", where=where, allowed="a text or a number")
        texts.append(answer)
    if not texts:
        raise DataError("the list of answers is empty", where=where)
    return tuple(texts)


def _sample(
    row: Mapping[str, Any], turns: tuple[Turn, ...], images: list[Any], where: str, number: int, context: RowContext
) -> Sample:
    _check_turns(turns, where)
    if context.system is not None and turns[0].role != "system":
        turns = (Turn("system", (Piece("text", context.system),)), *turns)
    given = row.get("id")
    if given is not None and not isinstance(given, (str, int)):
        raise DataError(f"the id is {_kind(given)}", where=where, allowed="a text or a whole number")
    tags = row.get("tags") or {}
    if not isinstance(tags, dict):
        raise DataError(f"`tags` is {_kind(tags)}", where=where, allowed='an object {"name": "value"}')
    answers = row.get("answers")
    return Sample(
        id=f"{context.name}-{number}" if given is None or given == "" else str(given),
        turns=turns,
        media=tuple(media_reference(image, context.root, where) for image in images),
        answers=() if answers is None else _answers(list(_listed(answers)), where),
        tags={str(key): str(value) for key, value in tags.items() if value is not None},
        source=context.name,
        where=where,
    )


def _check_turns(turns: tuple[Turn, ...], where: str) -> None:
    talk = turns[1:] if turns[0].role == "system" else turns
    for index, turn in enumerate(talk):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise DataError(
                f"turn {index + 1} is {turn.role}, {expected} was expected",
                where=where,
                allowed="optional system, then user and assistant in turn",
            )
    if not talk or talk[-1].role != "assistant":
        raise DataError("the last turn is not the assistant's", where=where, do="end the row with an answer")
    texts = [turn.text for turn in turns]
    for turn, text in zip(turns, texts, strict=True):
        if turn.role != "user" and any(piece.kind == "image" for piece in turn.pieces):
            raise DataError(f"a picture stands in a {turn.role} turn", where=where, allowed="pictures in user turns")
        if turn.role == "assistant" and not text.strip():
            raise DataError("an answer is empty", where=where, do="remove the row or write the answer")
        if turn.role == "user" and not turn.pieces:
            raise DataError("a user turn is empty", where=where)
    size = sum(map(len, texts))
    if size > MAX_CHARS:
        raise DataError(f"the texts have {size} characters", where=where, allowed=f"at most {MAX_CHARS}")
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"a text holds half a surrogate pair ({error.object[error.start]!a})", where=where) from error
