"""Paths that come from untrusted rows stay inside the folder they are relative to."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from mmft.errors import DataError

_SCHEME = re.compile(r"^(?:[A-Z][A-Z0-9+.-]*://|(?:file|data|https?|ftp|blob|javascript):|[A-Z]:[\\/])", re.I)


def contained(root: Path, relative: str) -> Path:
    """The regular file `relative` below `root`, links resolved; nothing is opened.

    Raises DataError for anything else: an absolute path outside, `..`, `~`, a URL, NUL, a link that leads out,
    a missing file, a folder, a pipe, a device.
    """
    path, mode = _found(root, relative)
    if not stat.S_ISREG(mode):
        raise DataError(
            f"path {_shown(relative)} is not a regular file",
            where=str(root),
            allowed=f"a file inside {root}",
            do="give a path relative to that folder, or set media_root",
        )
    return path


_ROOTS: dict[Path, tuple[Path, int, int]] = {}
"""Roots that were resolved, with device and inode of the folder they led to."""


def _resolved(root: Path) -> Path:
    """`root.resolve(strict=True)`, kept for as long as the root leads to the same folder."""
    now = os.stat(root)
    found = _ROOTS.get(root)
    if found is None or found[1:] != (now.st_dev, now.st_ino):
        found = _ROOTS[root] = (root.resolve(strict=True), now.st_dev, now.st_ino)
    return found[0]


def _plainly(base: Path, relative: str) -> tuple[Path, int] | None:
    """The path and its mode where nothing below the (resolved) base is a link, which is then what resolving would
    give."""
    names = relative.split("/")
    if "" in names or "." in names:
        return None
    at, mode = str(base).rstrip("/"), 0
    for name in names:
        at = f"{at}/{name}"
        mode = os.lstat(at).st_mode
        if stat.S_ISLNK(mode):
            return None
    return Path(at), mode


def _shown(relative: object) -> str:
    return repr(relative if not isinstance(relative, str) or len(relative) <= 120 else relative[:117] + "...")


def located(root: Path, relative: str) -> Path:
    """The file, folder or device `relative` below `root`, links resolved; as `contained`, whatever stands there."""
    return _found(root, relative)[0]


def _found(root: Path, relative: str) -> tuple[Path, int]:
    """`located`, and the mode of what stands there."""

    def refuse(why: str, do: str = "give a path relative to that folder, or set media_root") -> DataError:
        return DataError(f"path {_shown(relative)} {why}", where=str(root), allowed=f"a file inside {root}", do=do)

    if not isinstance(relative, str) or not relative:
        raise refuse("is not a path")
    if "\0" in relative:
        raise refuse("holds a NUL character")
    if _SCHEME.match(relative):
        raise refuse("is a URL", "download the file first; nothing is fetched from the network")
    if relative.startswith(("~", "\\\\", "//")):
        raise refuse("is not a plain path")
    if ".." in relative and ".." in re.split(r"[\\/]", relative):
        raise refuse("climbs out with '..'")
    try:
        base = _resolved(root if isinstance(root, Path) else Path(root))
        plain = _plainly(base, relative)
        if plain is not None:
            return plain
        path = (base / relative).resolve(strict=True)
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise refuse("does not exist", "check the spelling, and that media_root is the right folder") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise refuse(f"cannot be resolved ({type(error).__name__})") from None
    if not path.is_relative_to(base):
        raise refuse("leads outside")
    return path, mode


def cache_root() -> Path:
    """`$MMFT_CACHE` (`~/.cache/mmft`): what can be made or fetched again."""
    return Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser()


def cache_limit() -> int:
    """Bytes that a cache may hold: `$MMFT_CACHE_SIZE` (`20GB`, `500MB`, a number of bytes), 20 GB if not given."""
    text = os.environ.get("MMFT_CACHE_SIZE", "20GB").strip().upper()
    for unit, factor in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(float(text))
