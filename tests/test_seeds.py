"""Seeds are pure functions of their names, typed, spread out, and the same in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys

from mmft.seeds import fold, generator


def test_fold_is_the_documented_hash():
    text = "\x1f".join(["i7", "s5:order", "i3"])
    expected = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    assert fold(7, "order", 3) == expected
    assert 0 <= expected < 2**63


def test_keys_are_typed_and_not_concatenated():
    values = [fold(0, 1), fold(0, "1"), fold(0, "ab", "c"), fold(0, "a", "bc"), fold(0), fold(1), fold(0, "i1")]
    values += [fold(0, "a\x1fs1:b"), fold(0, "a", "b"), fold(-1), fold(0, "")]
    assert len(set(values)) == len(values)


def test_same_in_another_process_with_another_hash_seed():
    code = "from mmft.seeds import fold; print(fold(3, 'x', 4))"
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert found == {str(fold(3, "x", 4))}


def test_bits_are_balanced():
    values = [fold(0, index) for index in range(4000)]
    assert len(set(values)) == 4000
    for bit in (0, 17, 62):
        ones = sum(value >> bit & 1 for value in values)
        assert abs(ones - 2000) < 5 * (4000 * 0.25) ** 0.5  # five standard deviations of a fair coin


def test_generator_repeats():
    assert generator(1, "a").random() == generator(1, "a").random() != generator(1, "b").random()
