"""A row's messages become turns and its media their references, in the order of their places."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmft.data.references import media_reference
from mmft.data.sample import MediaKind, Piece, Role, Sample, Turn, says_nothing
from mmft.errors import DataError, choices

MAX_CHARS = 1_000_000
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
}
_MARK = re.compile(r"<(image|audio|video)>|<(image)_[0-9]+>|<img>([^<>]*)</img>")
_PICTURE_NUMBER = re.compile(r"Picture [0-9]+: $")
_LISTS: tuple[tuple[MediaKind, tuple[str, ...]], ...] = (
    ("image", ("images", "image")),
    ("audio", ("audios", "audio")),
    ("video", ("videos", "video")),
)
Place = tuple[MediaKind, Any]
"""A medium's kind and its reference where it stands in the text itself, else None."""


@dataclass(frozen=True)
class RowContext:
    """What a row's parser knows besides the row."""

    name: str
    root: Path
    columns: Mapping[str, str]
    system: str | None


def described(value: Any) -> str:
    """`missing`, or the value's type, for an error."""
    return "missing" if value is None else f"a {type(value).__name__}"


def listed(value: Any) -> list[Any]:
    """A list as it is, one value as a list of one, nothing as an empty one."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def media_lists(row: Mapping[str, Any]) -> dict[MediaKind, list[Any]]:
    """The media that a row lists beside its texts, by kind."""
    found: dict[MediaKind, list[Any]] = {}
    for kind, names in _LISTS:
        value = next((row[name] for name in names if row.get(name) is not None), None)
        if kind == "image" and isinstance(value, dict) and not {"bytes", "path"} & value.keys():
            value = [value[key] for key in sorted(value)]  # MiniCPM-V: {"<image_00>": path, ...}
        found[kind] = listed(value)
    return found


def split_marks(text: str, kinds: Collection[MediaKind], places: list[Place]) -> tuple[Piece, ...]:
    """A text with `<image>` (`<audio>`, `<video>`, MiniCPM-V's `<image_00>`, Qwen-VL's `<img>path</img>`) as pieces,
    those of `kinds` only; their places are added to `places`. The line break beside a mark goes with it."""
    pieces: list[Piece] = []
    rest = 0

    def add(part: str) -> None:
        if pieces and pieces[-1].kind != "text":
            part = part.removeprefix("\n")
        if part:
            pieces.append(Piece("text", part))

    for mark in _MARK.finditer(text):
        kind: Any = mark[1] or "image"
        if kind not in kinds:
            continue
        before = text[rest : mark.start()]
        add(_PICTURE_NUMBER.sub("", before) if mark[3] is not None else before)
        pieces.append(Piece(kind))
        places.append((kind, mark[3]))
        rest = mark.end()
    add(text[rest:])
    if len(pieces) > 1 and pieces[-1].kind != "text" and pieces[-2].kind == "text":
        pieces[-2] = Piece("text", pieces[-2].text.removesuffix("\n"))
    return tuple(piece for piece in pieces if piece.kind != "text" or piece.text)


def read_turns(
    value: Any, field: str, where: str, *, kinds: Collection[MediaKind], system: Any = None
) -> tuple[tuple[Turn, ...], list[Place]]:
    """The turns of a list of messages (`role`/`content` or `from`/`value`), and the places of their media."""
    if not isinstance(value, list) or not value:
        raise DataError(f"`{field}` is {described(value) if not isinstance(value, list) else 'empty'}", where=where)
    turns: list[Turn] = []
    places: list[Place] = []
    if isinstance(system, str) and system:
        turns.append(Turn("system", (Piece("text", system),)))
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise DataError(f"`{field}[{index}]` is {described(message)}", where=where, allowed="an object")
        keys = ("from", "value") if "from" in message or "value" in message else ("role", "content")
        role, content = message.get(keys[0]), message.get(keys[1])
        if not isinstance(role, str) or role not in ROLES:
            word = role if isinstance(role, str) else ""
            raise DataError(f"`{field}[{index}].{keys[0]}` is {role!r}", where=where, allowed=choices(ROLES, word=word))
        if isinstance(content, str):
            pieces = split_marks(content, kinds, places)
        elif isinstance(content, list):
            pieces = tuple(_piece(part, f"{field}[{index}].{keys[1]}", where, places) for part in content)
        else:
            raise DataError(
                f"`{field}[{index}].{keys[1]}` is {described(content)}", where=where, allowed="a text or a list"
            )
        turns.append(Turn(ROLES[role], pieces))
    return tuple(turns), places


def _piece(part: Any, field: str, where: str, places: list[Place]) -> Piece:
    if not isinstance(part, dict):
        part = {"type": None}
    form = part.get("type", next((key for key in ("text", "image", "audio", "video") if key in part), None))
    if form in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return Piece("text", part["text"])
    kind: Any = str(form).removeprefix("input_").removesuffix("_url")
    if kind not in ("image", "audio", "video") or form == "input_video":
        raise DataError(
            f"`{field}` holds a piece of type {form!r}",
            where=where,
            allowed="text (with `text`), image, image_url, audio, audio_url, input_audio, video, video_url",
        )
    names = (kind, f"{kind}_url", f"input_{kind}", "path", "url", "base64", "data")
    reference = next((part[key] for key in names if part.get(key) is not None), None)
    if isinstance(reference, dict) and "url" in reference:
        reference = reference["url"]
    elif isinstance(reference, dict) and isinstance(reference.get("data"), str):
        try:
            reference = base64.b64decode(reference["data"], validate=True)
        except binascii.Error as error:
            raise DataError(f"the base64 text of `{field}` is broken: {error}", where=where) from error
    places.append((kind, reference))
    return Piece(kind)


def placed_media(
    places: list[Place], lists: Mapping[MediaKind, list[Any]], where: str, context: RowContext
) -> list[Place]:
    """The media in the order of their places: inline ones where given, the rest from the row's lists.

    Raises DataError when places and media do not pair off.
    """
    rest = dict(lists)
    for kind, _ in _LISTS:
        wanted = sum(one == kind and reference is None for one, reference in places)
        given = rest.get(kind, [])
        if kind == "video" and wanted == 1 and len(given) > 1:
            given = rest[kind] = [given]  # the frames of the one video
        if wanted != len(given):
            raise DataError(f"{wanted} {kind} placeholder(s) but {len(given)} {kind}(s)", where=where)
    queues = {kind: iter(values) for kind, values in rest.items()}
    return [(kind, next(queues[kind]) if reference is None else reference) for kind, reference in places]


def answer_texts(value: Any, where: str) -> tuple[str, ...]:
    """The reference answers of a row; VQAv2's objects and numbers become texts."""
    texts = []
    for answer in value if isinstance(value, list) else [value]:
        if isinstance(answer, dict):  # VQAv2 writes {"answer": ..., "answer_confidence": ...}
            answer = answer.get("answer")
        if isinstance(answer, float) and not math.isfinite(answer):
            raise DataError(f"an answer is {answer}", where=where, allowed="a text or a finite number")
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            answer = str(answer)
        if not isinstance(answer, str):
            raise DataError(f"an answer is {described(answer)}", where=where, allowed="a text or a number")
        texts.append(answer)
    if not texts:
        raise DataError("the list of answers is empty", where=where)
    return tuple(texts)


def make_sample(
    row: Mapping[str, Any], turns: tuple[Turn, ...], media: list[Place], where: str, number: int, context: RowContext
) -> Sample:
    """The `Sample` of a conversation. Raises DataError for turns out of order, empty or too long, and for media that
    are not there."""
    check_turns(turns, where)
    if context.system is not None and turns[0].role != "system":
        turns = (Turn("system", (Piece("text", context.system),)), *turns)
    given = row.get("id")
    if given is not None and not isinstance(given, str | int):
        raise DataError(f"the id is {described(given)}", where=where, allowed="a text or a whole number")
    tags = row.get("tags") or {}
    if not isinstance(tags, dict):
        raise DataError(f"`tags` is {described(tags)}", where=where, allowed='an object {"name": "value"}')
    answers = row.get("answers")
    return Sample(
        id=f"{context.name}-{number}" if given is None or given == "" else str(given),
        turns=turns,
        media=tuple(media_reference(value, context.root, where, kind) for kind, value in media),
        answers=() if answers is None else answer_texts(listed(answers), where),
        tags={str(key): str(value) for key, value in tags.items() if value is not None},
        source=context.name,
        where=where,
    )


def check_turns(turns: tuple[Turn, ...], where: str) -> None:
    """Raise DataError for turns that a conversation cannot have."""
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
        medium = next((piece.kind for piece in turn.pieces if piece.kind != "text"), None)
        if turn.role != "user" and medium is not None:
            called = {"image": "picture", "audio": "sound"}.get(medium, medium)
            raise DataError(f"a {called} stands in a {turn.role} turn", where=where, allowed="media in user turns")
        if turn.role == "assistant" and says_nothing(text):
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
