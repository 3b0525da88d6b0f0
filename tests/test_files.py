"""Atomic files and folders, manifests, contained paths, locks: with real kills, real pipes and a real size limit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from mmft import files
from mmft.digests import blake3_hasher, digest_file
from mmft.errors import CheckpointError, DataError
from mmft.files import (
    append_jsonl,
    atomic_folder,
    contained,
    free_bytes,
    remove_stale,
    require_free,
    run_lock,
    sha256_bytes,
    sha256_file,
    verify_folder,
    write_bytes,
    write_json,
    write_manifest,
    write_text,
)


def run(code, *arguments, **keywords):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **keywords)


def fill(folder, **contents):
    for name, data in (contents or {"a.bin": b"one", "sub/b.bin": b"two" * 1000}).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


# ---------------------------------------------------------------- small writes


def test_writes_replace_and_leave_nothing_else(tmp_path):
    write_text(tmp_path / "deep" / "a.txt", "alt")
    write_text(tmp_path / "deep" / "a.txt", "neu\n")
    write_json(tmp_path / "deep" / "b.json", {"b": 1, "a": tmp_path, "s": {2, 1}})
    assert (tmp_path / "deep" / "a.txt").read_text() == "neu\n"
    assert json.loads((tmp_path / "deep" / "b.json").read_text()) == {"b": 1, "a": str(tmp_path), "s": [1, 2]}
    assert sorted(os.listdir(tmp_path / "deep")) == ["a.txt", "b.json"]


def test_nan_and_unknown_objects_are_refused_and_the_old_file_stays(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, 1)
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
    assert path.read_text() == "1\n"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    code = """
        import os, sys; from pathlib import Path
        os.umask(int(sys.argv[2]))
        from mmft.files import atomic_folder, write_text, append_jsonl
        root = Path(sys.argv[1])
        write_text(root / "a.txt", "x"); append_jsonl(root / "a.jsonl", {})
        with atomic_folder(root / "f") as folder:
            handle = os.open(folder / "tight.bin", os.O_CREAT | os.O_WRONLY, 0o600); os.close(handle)
    """
    assert run(code, tmp_path, umask).stderr == ""
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.rglob("*")}
    expected = dict.fromkeys(["a.txt", "a.jsonl", "tight.bin", "MANIFEST.json"], mode)
    assert modes == {**expected, "f": 0o777 & ~umask}


def test_append_closes_a_torn_line(tmp_path):
    path = tmp_path / "a.jsonl"
    append_jsonl(path, {"n": 1})
    path.write_bytes(path.read_bytes() + b'{"n": 2')
    append_jsonl(path, {"n": 3})
    assert path.read_text() == '{"n": 1}\n{"n": 2\n{"n": 3}\n'


def test_sha256_is_the_standard_one(tmp_path):
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    (tmp_path / "x").write_bytes(b"")
    assert sha256_bytes(b"") == sha256_file(tmp_path / "x") == empty


def test_blake3_is_the_standard_one(tmp_path):
    """The first two are in the specification's own test vectors (input of 0 and 1 bytes)."""
    for data, want in (
        (b"", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
        (b"\0", "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
        (b"abc", "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"),
    ):
        (tmp_path / "x").write_bytes(data)
        assert digest_file(tmp_path / "x", blake3_hasher()) == want


# ---------------------------------------------------------------- full disks


LIMIT = """
    import resource, sys; from pathlib import Path
    from mmft.errors import MmftError
    from mmft import files
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    root = Path(sys.argv[1])
    try:
        {body}
    except MmftError as error:
        print(error); sys.exit(error.exit_code)
"""


def test_a_full_disk_leaves_the_old_file_and_says_the_bytes(tmp_path):
    write_bytes(tmp_path / "a.bin", b"old")
    done = run(LIMIT.format(body='files.write_bytes(root / "a.bin", bytes(20_000))'), tmp_path)
    assert done.returncode == 4, done.stderr
    first, at, do = done.stdout.splitlines()
    assert first.startswith("CheckpointError: the disk is full: 20,000 bytes needed, ")
    assert first.endswith(" bytes free")
    assert at == f"  at      {tmp_path / 'a.bin'}"
    assert do.startswith("  do      free space (or raise the quota or file size limit)")
    assert os.listdir(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"old"


@pytest.mark.parametrize("writer", ["(f / 'x').write_bytes(bytes(20_000))", "save_file({'x': zeros(20_000)}, f / 'x')"])
def test_a_full_disk_inside_a_folder(tmp_path, writer):
    body = f"""
        from safetensors.numpy import save_file; from numpy import zeros
        with files.atomic_folder(root / "step") as f:
            {writer}
    """
    done = run(LIMIT.format(body=textwrap.dedent(body).strip().replace("\n", "\n        ")), tmp_path)
    assert done.returncode == 4, done.stderr
    assert done.stdout.startswith("CheckpointError: the disk is full: ")
    assert os.listdir(tmp_path) == []


def test_require_free(tmp_path):
    require_free(tmp_path / "not" / "yet", 1, what="a checkpoint")
    with pytest.raises(CheckpointError) as caught:
        require_free(tmp_path, 10**18, what="a checkpoint")
    text = str(caught.value)
    assert text.startswith(
        "CheckpointError: not enough disk space for a checkpoint: 1,000,000,000,000,000,000 bytes needed, "
    )
    assert free_bytes(tmp_path / "not" / "yet") > 0


def test_an_unwritable_place_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write a.txt: "):
        write_text(tmp_path / "file" / "a.txt", "x")
    with pytest.raises(CheckpointError, match="cannot write step: "), atomic_folder(tmp_path / "file" / "step"):
        pass


# ---------------------------------------------------------------- atomic folders


def test_a_folder_appears_whole_with_a_manifest(tmp_path):
    final = tmp_path / "deep" / "step-1"
    with atomic_folder(final) as folder:
        fill(folder)
        assert not final.exists() and folder.name == f".step-1.{os.getpid()}.tmp"
    verify_folder(final)
    manifest = json.loads((final / "MANIFEST.json").read_text())
    assert manifest["files"]["a.bin"] == {"bytes": 3, "sha256": sha256_bytes(b"one")}
    assert os.listdir(tmp_path / "deep") == ["step-1"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_what_was(tmp_path, error):
    final = tmp_path / "step"
    with pytest.raises(error), atomic_folder(final) as folder:
        fill(folder)
        raise error
    assert os.listdir(tmp_path) == []
    with atomic_folder(final) as folder:
        fill(folder)
    with pytest.raises(error), atomic_folder(final, replace=True) as folder:
        raise error
    verify_folder(final)
    assert os.listdir(tmp_path) == ["step"]


def test_an_existing_folder_is_refused_or_replaced(tmp_path):
    final = tmp_path / "step"
    for content in (b"1", b"2"):
        with atomic_folder(final, replace=True) as folder:
            fill(folder, x=content)
    assert (final / "x").read_bytes() == b"2" and os.listdir(tmp_path) == ["step"]
    with pytest.raises(CheckpointError) as caught, atomic_folder(final):
        pass
    assert str(caught.value) == (
        f"CheckpointError: step exists already\n  at      {final}\n  do      delete it, or write to another folder"
    )
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(final)
    for name in ("file", "link"):
        with (
            pytest.raises(CheckpointError, match=f"{name} exists already"),
            atomic_folder(tmp_path / name, replace=True),
        ):
            pass


def test_a_failed_swap_puts_the_old_folder_back(tmp_path, monkeypatch):
    final = tmp_path / "step"
    with atomic_folder(final) as folder:
        fill(folder, x=b"old")
    rename, calls = os.rename, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", second_fails)
    with pytest.raises(CheckpointError, match="Input/output error"), atomic_folder(final, replace=True) as folder:
        fill(folder, x=b"new")
    assert (final / "x").read_bytes() == b"old" and os.listdir(tmp_path) == ["step"]


def test_a_link_inside_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x is not a regular file"), atomic_folder(tmp_path / "step") as folder:
        (folder / "x").symlink_to("/etc/passwd")
    assert os.listdir(tmp_path) == []


def test_kill_9_in_the_middle_leaves_nothing_final_and_the_rest_is_cleaned(tmp_path):
    code = """
        import sys, time; from pathlib import Path
        from mmft.files import atomic_folder
        with atomic_folder(Path(sys.argv[1]) / "step") as folder:
            (folder / "a.bin").write_bytes(bytes(1000)); print("ready", flush=True); time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    leftover = tmp_path / f".step.{process.pid}.tmp"
    assert remove_stale(tmp_path) == () and leftover.is_dir()  # its process still runs
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == [leftover.name]
    assert remove_stale(tmp_path) == (leftover,)
    assert os.listdir(tmp_path) == []


def _replace_for_ever(root):
    for number in range(10**6):
        with atomic_folder(root / "step", replace=True) as folder:
            fill(folder, x=str(number).encode() * 1000)


def test_kill_9_at_random_moments_leaves_a_verified_folder(tmp_path):
    draw = random.Random(0)
    for _ in range(12):
        process = multiprocessing.get_context("fork").Process(target=_replace_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(0.02 + draw.random() * 0.05)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        remove_stale(tmp_path)
        if list(tmp_path.iterdir()):
            assert os.listdir(tmp_path) == ["step"]
            verify_folder(tmp_path / "step")


def test_a_scratch_folder_goes_with_its_block_and_after_a_kill(tmp_path):
    with files.scratch_folder(tmp_path, "verify") as mine:
        (mine / "a").write_text("a")
        assert remove_stale(tmp_path) == ()  # it is in use, though its process is this one
        assert mine.is_dir()
    assert list(tmp_path.iterdir()) == []
    code = """
        import os, pathlib, sys
        from mmft.files import scratch_folder
        with scratch_folder(pathlib.Path(sys.argv[1]), "verify"):
            os._exit(9)
    """
    assert run(code, tmp_path).returncode == 9
    left = list(tmp_path.iterdir())
    assert len(left) == 1
    assert remove_stale(tmp_path) == tuple(left)
    assert list(tmp_path.iterdir()) == []


def test_stale_leftovers_of_this_pid_and_interrupted_swaps(tmp_path):
    dead = 2**22 + 1  # above Linux' largest pid
    (tmp_path / f".mine.{os.getpid()}.tmp").mkdir()
    (tmp_path / f".a.txt.{dead}-3.tmp").write_text("")
    (tmp_path / f".step.{dead}.old.tmp").mkdir()
    (tmp_path / ".keep.tmp").mkdir()
    with atomic_folder(tmp_path / "open") as folder:
        removed = remove_stale(tmp_path)
        assert folder.is_dir()
    assert sorted(path.name for path in removed) == sorted([f".a.txt.{dead}-3.tmp", f".mine.{os.getpid()}.tmp"])
    assert sorted(os.listdir(tmp_path)) == [".keep.tmp", "open", "step"]
    assert remove_stale(tmp_path / "nothing") == ()


# ---------------------------------------------------------------- manifests


@pytest.fixture
def pair(tmp_path):
    for step in ("step-1", "step-2"):
        with atomic_folder(tmp_path / step) as folder:
            fill(folder, **{"a.bin": step.encode() * 500, "sub/b.bin": bytes(range(256)) * 8})
    return tmp_path


def damage(path, kind, draw):
    data = bytearray(path.read_bytes())
    if kind == "flip":
        position = draw.randrange(len(data) * 8)
        data[position // 8] ^= 1 << position % 8
    elif kind == "cut":
        del data[draw.randrange(len(data)) :]
    else:
        start = draw.randrange(len(data))
        data[start : start + 512] = bytes(b ^ 255 for b in data[start : start + 512])
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("kind", ["flip", "cut", "block"])
def test_every_damage_is_found_and_named(pair, kind):
    draw = random.Random(kind)
    folder = pair / "step-1"
    for _ in range(40):
        name = draw.choice(["a.bin", "sub/b.bin", "MANIFEST.json"])
        good = (folder / name).read_bytes()
        damage(folder / name, kind, draw)
        with pytest.raises(CheckpointError) as caught:
            verify_folder(folder)
        if name != "MANIFEST.json":
            expected, actual = sha256_bytes(good), sha256_file(folder / name)
            size = (folder / name).stat().st_size
            assert str(caught.value) == (
                f"CheckpointError: {name} is damaged: expected sha256 {expected} ({len(good):,} bytes), "
                f"actual {actual} ({size:,} bytes)\n  at      {folder / name}\n"
                "  do      use an older checkpoint, or copy the folder again from its source"
            )
        (folder / name).write_bytes(good)
    verify_folder(folder)


def named_by_blake3(folder):
    """The manifest that names a.bin's BLAKE3 and the other files' sha256."""
    (folder / "MANIFEST.json").unlink()
    digest = digest_file(folder / "a.bin", blake3_hasher())
    write_manifest(folder, known={"a.bin": {"bytes": (folder / "a.bin").stat().st_size, "blake3": digest}})
    return digest


@pytest.mark.parametrize("kind", ["flip", "cut", "block"])
def test_every_damage_of_a_file_with_blake3_is_found(pair, kind):
    folder, draw = pair / "step-1", random.Random(kind)
    digest = named_by_blake3(folder)
    entries = json.loads((folder / "MANIFEST.json").read_text())["files"]
    assert entries["a.bin"] == {"bytes": 3000, "blake3": digest} and set(entries["sub/b.bin"]) == {"bytes", "sha256"}
    verify_folder(folder)
    good = (folder / "a.bin").read_bytes()
    for _ in range(40):
        damage(folder / "a.bin", kind, draw)
        with pytest.raises(CheckpointError, match=rf"a\.bin is damaged: expected blake3 {digest} \(3,000 bytes\)"):
            verify_folder(folder)
        (folder / "a.bin").write_bytes(good)
    (folder / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=rf"a\.bin is missing: expected blake3 {digest}"):
        verify_folder(folder)


@pytest.mark.parametrize("digests", [{}, {"md5": "0"}, {"sha256": "0", "blake3": "0"}], ids=["none", "unknown", "two"])
def test_an_entry_names_one_known_digest(pair, digests):
    entries = {"a.bin": {"bytes": 3000, **digests}}
    text = json.dumps({"files": entries, "digest": sha256_bytes(files.to_json(entries).encode())})
    (pair / "step-1" / "MANIFEST.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read: an entry names \d digests"):
        verify_folder(pair / "step-1")


def test_a_known_file_of_another_size_is_refused(pair):
    (pair / "step-1" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"a\.bin has changed while it was written"):
        write_manifest(pair / "step-1", known={"a.bin": {"bytes": 2999, "blake3": "0"}})
    assert not (pair / "step-1" / "MANIFEST.json").exists()


def test_missing_extra_and_swapped_files_are_named_together(pair):
    shutil.copy(pair / "step-2" / "a.bin", pair / "step-1" / "a.bin")
    (pair / "step-1" / "sub" / "b.bin").unlink()
    (pair / "step-1" / "new.bin").write_text("")
    with pytest.raises(CheckpointError) as caught:
        verify_folder(pair / "step-1")
    text = [problem.what.split(":")[0] for problem in caught.value.problems]
    assert text == ["a.bin is damaged", "new.bin is not in MANIFEST.json", "sub/b.bin is missing"]
    verify_folder(pair / "step-2")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"files": {"a": 1}, "digest": ""}', b"[" * 10**5, b"1"]
)
def test_a_broken_manifest_is_a_checkpoint_error(pair, content):
    (pair / "step-1" / "MANIFEST.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json cannot be read"):
        verify_folder(pair / "step-1")


def test_no_manifest_and_a_manifest_rewritten_by_hand(pair):
    path = pair / "step-1" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["a.bin"]["bytes"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged: expected sha256"):
        verify_folder(pair / "step-1")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"step-1 has no MANIFEST\.json: it is not complete"):
        verify_folder(pair / "step-1")


# ---------------------------------------------------------------- the lock


def test_second_run_is_refused_and_a_dead_one_is_taken_over(tmp_path):
    code = """
        import sys, time; from pathlib import Path
        from mmft.files import run_lock
        with run_lock(Path(sys.argv[1])):
            print("ready", flush=True); time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    held = rf"another run is using this folder \(process {process.pid} on "
    with pytest.raises(CheckpointError, match=held), run_lock(tmp_path):
        pass
    process.kill()
    process.wait()
    with run_lock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(CheckpointError, match="another run"), run_lock(tmp_path):
            pass
    assert os.listdir(tmp_path) == []


def test_a_reused_pid_and_a_torn_lock_are_taken_over_and_another_host_is_not(tmp_path):
    host = os.uname().nodename
    for content in ("", "{", json.dumps({"pid": os.getppid(), "host": host, "started": 1})):
        (tmp_path / ".lock").write_text(content)
        with run_lock(tmp_path):
            pass
    (tmp_path / ".lock").write_text(json.dumps({"pid": 1, "host": host + "-other", "started": 1}))
    with pytest.raises(CheckpointError, match="on .*-other"), run_lock(tmp_path):
        pass


# ---------------------------------------------------------------- contained paths


@pytest.fixture
def root(tmp_path):
    inside, evil = tmp_path / "root", tmp_path / "root_evil"
    (inside / "sub").mkdir(parents=True)
    evil.mkdir()
    for path in (inside / "a.png", inside / "sub" / "b c.png", evil / "x.png", tmp_path / "out.png"):
        path.write_bytes(b"x")
    (inside / "link.png").symlink_to(tmp_path / "out.png")
    (inside / "linkdir").symlink_to(evil)
    (inside / "loop").symlink_to(inside / "loop")
    (inside / "good.png").symlink_to(inside / "a.png")
    (inside / "zero").symlink_to("/dev/zero")
    os.mkfifo(inside / "pipe")
    return inside


def test_good_paths(root):
    assert contained(root, "a.png") == (root / "a.png").resolve()
    assert contained(root, "./sub/b c.png") == (root / "sub" / "b c.png").resolve()
    assert contained(root, str(root / "a.png")) == contained(root, "good.png") == contained(root, "a.png")


HOSTILE = [
    "../out.png",
    "sub/../../out.png",
    "sub/../a.png",
    "../root_evil/x.png",
    "ROOT/../root_evil/x.png",
    "TMP/root_evil/x.png",
    "TMP/out.png",
    "/etc/passwd",
    "/dev/zero",
    "/proc/self/environ",
    "link.png",
    "linkdir/x.png",
    "linkdir",
    "loop",
    "zero",
    "pipe",
    "sub",
    ".",
    "",
    "missing.png",
    "a.png/x",
    "a.png\0.jpg",
    "~/x.png",
    "~root/x.png",
    "file:///etc/passwd",
    "file:/etc/passwd",
    "http://127.0.0.1/x.png",
    "HTTPS://example.org/x.png",
    "data:image/png;base64,AAAA",
    "s3://bucket/x",
    "\\\\host\\share\\x.png",
    "//host/share/x.png",
    "..\\out.png",
    "C:\\x.png",
    "%2e%2e/out.png",
    "%2e%2e%2fout.png",
    "x" * 5000,
    "a/" * 3000,
    "\ud800.png",
    None,
    3,
    b"a.png",
]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:30])
def test_hostile_paths_are_refused_without_opening_anything(root, value):
    if isinstance(value, str):
        value = value.replace("TMP", str(root.parent)).replace("ROOT", str(root))
    start = time.perf_counter()
    with pytest.raises(DataError) as caught:
        contained(root, value)
    assert time.perf_counter() - start < 1.0
    assert f"allowed a file inside {root}" in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_the_text_of_an_escape(root):
    with pytest.raises(DataError) as caught:
        contained(root, "../out.png")
    assert str(caught.value) == (
        f"DataError: path '../out.png' climbs out with '..'\n  at      {root}\n  allowed a file inside {root}\n"
        "  do      give a path relative to that folder, or set media_root"
    )


def test_containment_opens_no_file(root):
    code = """
        import sys; from pathlib import Path
        from mmft.files import contained; from mmft.errors import DataError
        opened = []
        sys.addaudithook(lambda name, args: opened.append(args[0]) if name == "open" else None)
        for value in ("pipe", "zero", "link.png", "a.png", "/proc/self/environ"):
            try: contained(Path(sys.argv[1]), value)
            except DataError: pass
        print(opened)
    """
    assert run(code, root).stdout == "[]\n"
