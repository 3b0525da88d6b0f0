"""Kernels in C, compiled on the user's machine by its own gcc: found, built once, loaded, and chosen for a run.

The sources are `mmft/fast/native/`. What is built is kept in `kernels/` of the cache (`MMFT_CACHE`, else
`~/.cache/mmft`), a folder that is used only where nobody but its owner, this user, may write; else it is built anew for
the process. Its name holds the digest of sources, flags and compiler. The library shares torch's OpenMP threads: a
second set of threads would wait in the way of the first. Price: a second of gcc, once.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
FLAGS = (
    *("-O3", "-fopenmp", "-shared", "-fPIC", "-fno-strict-aliasing", "-fno-math-errno"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)
SECONDS = 120
"""gcc is given up after."""
SEAL = hashlib.sha256().digest_size
"""Bytes behind a library."""


class NoKernels(Exception):
    """Why there are none here."""


class _Chosen:
    library: ctypes.CDLL | None = None


def choose(library: ctypes.CDLL | None) -> ctypes.CDLL | None:
    """Let calls that fit go through `library` (None: through torch); what was chosen before."""
    before, _Chosen.library = _Chosen.library, library
    return before


def chosen() -> ctypes.CDLL | None:
    """What `choose` chose."""
    return _Chosen.library


def why_not() -> str | None:
    """What is missing for kernels on this machine; None when nothing is."""
    flags = _processor().split()
    if "avx512_bf16" not in flags:
        return "the processor has no products of bfloat16 in vectors (AVX512-BF16)"
    return None if shutil.which("gcc") else "there is no gcc to build them with"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The built library. Raises NoKernels where it cannot be built or would bring threads of its own."""
    reason = why_not()
    if reason:
        raise NoKernels(reason)
    threads = _threads()
    sources = (str(one) for one in sorted(SOURCES.glob("*.c")))
    found = built(digest, [_gcc(), *FLAGS, *sources, "-lm"])
    if _threads() - threads:  # those of other packages are idle while torch's work
        raise NoKernels(f"they bring a second set of threads ({', '.join(sorted(_threads() - threads))})")
    return found


def built(name: Callable[[], str], words: list[str]) -> ctypes.CDLL:
    """The library that `words` build, kept by a name that says all it depends on. Raises NoKernels."""
    scratch = None
    try:
        folder = _own_folder() or (scratch := Path(tempfile.mkdtemp(prefix="mmft-kernels-")))
        return _loaded(folder / f"{name()}.so", words)
    except subprocess.CalledProcessError as error:
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line] or [f"exit {error.returncode}"]
        raise NoKernels(f"{Path(words[0]).name} cannot build them ({lines[0].strip()[:200]})") from None
    except subprocess.TimeoutExpired:
        raise NoKernels(f"{Path(words[0]).name} took more than {SECONDS} s") from None
    except OSError as error:
        raise NoKernels(f"what {Path(words[0]).name} builds cannot be kept or loaded ({error})") from None
    finally:
        if scratch is not None:  # a loaded library stays, its file need not
            shutil.rmtree(scratch, ignore_errors=True)


def digest() -> str:
    """Of sources, flags and compiler: what the bits of the kernels' values depend on."""
    told = hashlib.sha256(" ".join((*FLAGS, said([_gcc(), "-v"]))).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        told.update(source.read_bytes())
    return told.hexdigest()[:32]


def _gcc() -> str:
    return shutil.which("gcc") or "gcc"


def _loaded(path: Path, words: list[str]) -> ctypes.CDLL:
    """What lies at `path`, built where nothing does or what does cannot be loaded."""
    if _is_whole(path):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    _compile(path, words)
    return ctypes.CDLL(str(path))


def _is_whole(path: Path) -> bool:
    """Whether a library ends with the digest of all before it: loading a part of one kills the process."""
    data = path.read_bytes() if path.is_file() else b""
    return len(data) > SEAL and hashlib.sha256(data[:-SEAL]).digest() == data[-SEAL:]


def _compile(path: Path, words: list[str]) -> None:
    """Beside `path`, and renamed when it lies on the disk: processes that build at once end with the same file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        made = Path(name) / "kernels.so"
        said([*words, "-o", str(made)])
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())  # behind what a loader reads
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)


def said(words: list[str]) -> str:
    """What a programme writes. Raises CalledProcessError where it fails."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True)
    return done.stdout + done.stderr


def _own_folder() -> Path | None:
    """The cache's folder for libraries, where only this user can write into it."""
    folder = Path(os.environ.get("MMFT_CACHE", "~/.cache/mmft")).expanduser() / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.lstat()
    except OSError:
        return None
    own = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if own and not folder.is_symlink() and os.access(folder, os.W_OK) else None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


def _threads() -> set[str]:
    """Libraries of OpenMP threads in this process."""
    names = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    return {Path(name).name for name in names if Path(name).name.startswith(("libgomp", "libiomp5", "libomp."))}


def whole(*tensors: torch.Tensor) -> bool:
    """Whether all are bfloat16 on the CPU, their values side by side."""
    return all(one.dtype == torch.bfloat16 and one.is_contiguous() and one.device.type == "cpu" for one in tensors)


def pointer(x: torch.Tensor | None) -> ctypes.c_void_p:
    """A tensor's first value, or nothing."""
    return ctypes.c_void_p(0 if x is None else x.data_ptr())
