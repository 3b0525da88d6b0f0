"""The dialects of conversations: `messages`, LLaVA `conversations`, `prompt` and `qa`; each one function from a row to
a `Sample`.

`messages` are OpenAI's and transformers' (`role`, `content` a text or pieces, data: URIs too); `llava` are LLaVA's,
ShareGPT's, Qwen-VL's, InternVL's and MiniCPM-V's `conversations`; `prompt` is TRL's `prompt` and `completion`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmft.data.sample import MediaKind, Piece, Sample, Turn
from mmft.data.turns import (
    MAX_CHARS,
    Place,
    RowContext,
    answer_texts,
    described,
    listed,
    make_sample,
    media_lists,
    placed_media,
    read_turns,
    split_marks,
)
from mmft.errors import DataError

__all__ = ["DIALECTS", "MAX_CHARS", "RowContext", "guess_format"]

_QA_FIELDS = ("image", "audio", "video", "question", "answer", "answers", "id", "tags")
_TURNS = ("messages", "conversations", "conversation")


def guess_format(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], *, where: str) -> str:
    """The dialect of most of the given rows (some may be bad); DataError when there is none."""

    def common(*groups: Sequence[str]) -> bool:
        fitting = sum(all(any(name in row for name in names) for names in groups) for row in rows)
        return 2 * fitting > len(rows)

    if common(["messages"]):
        return "messages"
    if common(["conversations", "conversation"]):
        return "llava"
    if common(["prompt"], ["completion"]):
        return "prompt"
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


def _marked(lists: Mapping[MediaKind, list[Any]]) -> set[MediaKind]:
    """The marks that stand for media: `<image>` always, `<audio>` and `<video>` where the row has such."""
    return {"image", *(kind for kind, values in lists.items() if values)}


def parse_messages(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """`messages`: roles with text (`<image>` marks a picture) or lists of pieces; media inline, or in `images`,
    `audios` and `videos`."""
    lists = media_lists(row)
    turns, places = read_turns(row.get("messages"), "messages", where, kinds=_marked(lists), system=row.get("system"))
    return make_sample(row, turns, placed_media(places, lists, where, context), where, number, context)


def parse_llava(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """LLaVA and its kin: `conversations` of `from`/`value` or `role`/`content`, `image` a path, a list of paths, or
    (MiniCPM-V) an object of them, whose pictures stand first where no mark says otherwise."""
    lists = media_lists(row)
    name = next((name for name in _TURNS[1:] if name in row), "conversations")
    turns, places = read_turns(row.get(name), name, where, kinds=_marked(lists), system=row.get("system"))
    if isinstance(row.get("image"), dict) and not places:
        turns, places = _in_front(turns, lists)
    return make_sample(row, turns, placed_media(places, lists, where, context), where, number, context)


def parse_prompt(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """TRL: `prompt` and `completion`, texts or lists of messages; media without a place stand first in the first user
    turn."""
    lists = media_lists(row)
    turns: tuple[Turn, ...] = ()
    places: list[Place] = []
    for field, role in (("prompt", "user"), ("completion", "assistant")):
        value = row.get(field)
        value = [{"role": role, "content": value}] if isinstance(value, str) else value
        found, inline = read_turns(value, field, where, kinds=_marked(lists))
        turns, places = (*turns, *found), [*places, *inline]
    if not places:
        turns, places = _in_front(turns, lists)
    return make_sample(row, turns, placed_media(places, lists, where, context), where, number, context)


def _in_front(turns: tuple[Turn, ...], lists: Mapping[MediaKind, list[Any]]) -> tuple[tuple[Turn, ...], list[Place]]:
    """The turns with the listed media before the first user's text."""
    places: list[Place] = [(kind, None) for kind, values in lists.items() for _ in values]
    at = next((at for at, turn in enumerate(turns) if turn.role == "user"), 0)
    first = Turn(turns[at].role, (*(Piece(kind) for kind, _ in places), *turns[at].pieces))
    return (*turns[:at], first, *turns[at + 1 :]), places


def parse_qa(row: Mapping[str, Any], where: str, number: int, context: RowContext) -> Sample:
    """`image` (or `audio`, `video`), `question`, `answer(s)`; a list of answers gives the references, its most common
    one is trained on."""
    field = {name: row.get(context.columns.get(name, name)) for name in _QA_FIELDS}
    question = field["question"]
    if not isinstance(question, str):
        raise DataError(f"the question is {described(question)}", where=where, allowed="a text")
    lists: dict[MediaKind, list[Any]] = {kind: listed(field[kind]) for kind in ("image", "audio", "video")}
    answers = answer_texts(field["answers"] if field["answer"] is None else field["answer"], where)
    places: list[Place] = []
    pieces = split_marks(question, _marked(lists), places)
    turns: tuple[Turn, ...] = (
        Turn("user", pieces if places else (Piece("text", question),)),
        Turn("assistant", (Piece("text", Counter(answers).most_common(1)[0][0]),)),
    )
    if not places:
        turns, places = _in_front(turns, lists)
    merged = dict(row) | {"id": field["id"], "tags": field["tags"], "answers": answers if len(answers) > 1 else None}
    return make_sample(merged, turns, placed_media(places, lists, where, context), where, number, context)


DIALECTS: dict[str, Callable[[Mapping[str, Any], str, int, RowContext], Sample]] = {
    "messages": parse_messages,
    "llava": parse_llava,
    "prompt": parse_prompt,
    "qa": parse_qa,
}
