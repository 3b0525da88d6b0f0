"""How the kernels are found, built, kept and loaded, and what a run does where they cannot be."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mmft.fast import native_build, native_kernels, native_rows
from mmft.fast.native_build import NoKernels
from mmft.fast.plan import NotHere, fast_plan
from tests.fast.helpers import workplace
from tests.fast.native import needs_kernels
from tests.runs import environment

pytestmark = needs_kernels
CALL = """
import torch
from mmft.fast import native_build, native_rows
native_build.choose(native_build.library())
x = torch.ones(40, dtype=torch.bfloat16)
assert native_rows.silu_times(x, x) is not None
"""


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded before or kept behind."""
    monkeypatch.setenv("MMFT_CACHE", str(tmp_path / "cache"))
    native_build.library.cache_clear()
    yield
    native_build.library.cache_clear()
    native_build.choose(None)


def kept(tmp_path: Path) -> list[str]:
    """Names in the cache's folder of libraries."""
    return sorted(path.name for path in (tmp_path / "cache" / "kernels").glob("*"))


def works(library) -> bool:
    native_build.choose(library)
    x = torch.randn(40).bfloat16()
    return torch.equal(native_rows.silu_times(x, torch.ones_like(x)), torch.nn.functional.silu(x))


def programme(folder: Path, text: str) -> Path:
    """A `gcc` that does something else, first in the PATH."""
    folder.mkdir()
    (folder / "gcc").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "gcc").chmod(0o755)
    return folder


def test_it_is_built_once_into_a_folder_of_the_users_own(tmp_path, monkeypatch):
    assert works(native_build.library())
    (name,) = kept(tmp_path)
    folder = tmp_path / "cache" / "kernels"
    assert folder.stat().st_mode & 0o777 == 0o700
    before = (folder / name).stat()
    native_build.library.cache_clear()
    monkeypatch.setattr(native_build, "_compile", None)  # is not asked again
    assert works(native_build.library())
    after = (folder / name).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_other_sources_or_flags_are_another_library(tmp_path, monkeypatch):
    native_build.library()
    sources = tmp_path / "native"
    shutil.copytree(native_build.SOURCES, sources)
    (sources / "vectors.h").write_text((sources / "vectors.h").read_text() + "\n")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    native_build.library.cache_clear()
    assert works(native_build.library()) and len(kept(tmp_path)) == 2
    assert f"{native_build.digest()}.so" in kept(tmp_path)
    monkeypatch.setattr(native_build, "FLAGS", (*native_build.FLAGS, "-g0"))
    native_build.library.cache_clear()
    assert works(native_build.library()) and len(kept(tmp_path)) == 3


@pytest.mark.parametrize("how", ["empty", "a part", "a byte of it another", "no library"])
def test_a_file_that_cannot_be_loaded_is_built_again(tmp_path, how):
    """In processes of their own: in this one the path counts as loaded, and a part of a library kills its loader."""
    words = [sys.executable, "-c", CALL]
    assert subprocess.run(words, env=environment(), timeout=300).returncode == 0
    (name,) = kept(tmp_path)
    path = tmp_path / "cache" / "kernels" / name
    size = path.stat().st_size
    data = path.read_bytes()
    other = data[:9000] + bytes([data[9000] ^ 1]) + data[9001:]
    sealed = b"no library" + hashlib.sha256(b"no library").digest()
    broken = {"empty": b"", "a part": data[:1000], "a byte of it another": other, "no library": sealed}
    path.write_bytes(broken[how])
    assert subprocess.run(words, env=environment(), timeout=300).returncode == 0
    assert kept(tmp_path) == [name] and path.stat().st_size == size and path.read_bytes() != broken[how]


@pytest.mark.parametrize("how", ["a file in its place", "written by a group", "a link", "of somebody else"])
def test_a_folder_that_is_not_the_users_own_is_not_used(tmp_path, monkeypatch, how):
    """Built for the process then, and nothing is left of it."""
    folder, scratch = tmp_path / "cache" / "kernels", tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder.parent.mkdir()
    if how == "a file in its place":
        folder.write_text("")
    elif how == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.mkdir()
        folder.chmod(0o770 if how == "written by a group" else 0o700)
    if how == "of somebody else":
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    assert native_build._own_folder() is None
    assert works(native_build.library())
    assert not list(scratch.iterdir()) and not (tmp_path / "elsewhere" / "x").exists()
    assert how == "a file in its place" or not list(folder.iterdir())


def test_two_processes_build_at_once(tmp_path):
    started = [subprocess.Popen([sys.executable, "-c", CALL], env=environment()) for _ in range(2)]
    assert [one.wait(timeout=300) for one in started] == [0, 0]
    (name,) = kept(tmp_path)
    assert name.endswith(".so")


def test_without_a_compiler_the_plan_says_so_and_the_run_goes_on(tmp_path, monkeypatch):
    _, setting, _ = workplace(tmp_path, bf16=True)
    assert fast_plan(setting, [native_kernels.CANDIDATE]).on("native_kernels")
    monkeypatch.setenv("PATH", str(tmp_path))
    (row,) = fast_plan(setting, [native_kernels.CANDIDATE]).rows
    assert not row.on and row.reason == "there is no gcc to build them with"
    with pytest.raises(NoKernels, match="no gcc"):
        native_build.library()


def test_a_processor_without_the_products_is_told(monkeypatch):
    monkeypatch.setattr(native_build, "_processor", lambda: "fpu avx2 avx512f")
    assert "AVX512-BF16" in (native_build.why_not() or "")
    with pytest.raises(NoKernels, match="AVX512-BF16"):
        native_build.library()


def test_what_gcc_says_of_sources_it_cannot_build_is_the_reason(tmp_path, monkeypatch):
    _, setting, work = workplace(tmp_path, bf16=True)
    sources = tmp_path / "native"
    shutil.copytree(native_build.SOURCES, sources)
    (sources / "rows.c").write_text("int here = there;\n")
    monkeypatch.setattr(native_build, "SOURCES", sources)
    with pytest.raises(NotHere, match="gcc cannot build them .*rows.c.*there.* undeclared"):
        native_kernels.install(setting, work)
    assert native_build.chosen() is None and kept(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("exit 3", "gcc cannot build them .exit 3"),
        ("sleep 30", "gcc took more than"),
        ('case "$1" in -v) ;; *) echo "ld: error: no space" >&2; exit 1;; esac', "no space"),
        ('while [ "$1" != -o ]; do [ "$1" = -v ] && exit; shift; done; echo x > "$2"', "cannot be kept or loaded"),
    ],
)
def test_a_compiler_that_fails_ends_no_run(tmp_path, monkeypatch, text, reason):
    monkeypatch.setenv("PATH", f"{programme(tmp_path / 'bin', text)}:{os.environ['PATH']}")
    monkeypatch.setattr(native_build, "SECONDS", 2)
    with pytest.raises(NoKernels, match=reason):
        native_build.library()


def test_no_room_for_files_ends_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    monkeypatch.setattr(native_build, "_own_folder", lambda: None)
    with pytest.raises(NoKernels, match="cannot be kept"):
        native_build.library()


def test_a_second_set_of_threads_is_refused(monkeypatch):
    seen = iter(({"libgomp.so.1", "libgomp-of-another-package.so.1"}, *2 * [{"libgomp.so.1", "libiomp5.so"}]))
    monkeypatch.setattr(native_build, "_threads", lambda: next(seen))
    with pytest.raises(NoKernels, match=r"threads \(libiomp5.so\)"):
        native_build.library()
