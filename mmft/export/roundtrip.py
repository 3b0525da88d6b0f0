"""What a weight is after bitsandbytes has quantized and dequantized it, in row blocks.

`round(dequantize(quantize(W)))` is the base that a QLoRA run really saw. bitsandbytes' double quantization takes the
mean of all block maxima first, so a first pass over the weight collects them (1/64 of its elements, in float32).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import bitsandbytes.functional as bnb
import torch

from mmft.errors import ExportError
from mmft.recipe.schema import QuantizationSection

BLOCK = 64  # bitsandbytes' default, and the only one transformers' BitsAndBytesConfig can ask for


class RoundTrip:
    """One weight. `read(start, stop)` gives rows in the type training held them in; blocks must not cut 64 elements."""

    def __init__(
        self,
        read: Callable[[int, int], torch.Tensor],
        blocks: Iterable[tuple[int, int]],
        section: QuantizationSection,
    ) -> None:
        if section.load_in_4bit == section.load_in_8bit:
            raise ExportError(
                "a quantized base has load_in_4bit or load_in_8bit",
                where="quantization",
                do="set exactly one of the two",
            )
        self._read, self._section = read, section
        self._absmax = self._four_bit_absmax(blocks) if section.load_in_4bit else None

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows `start:stop` after the round trip, in the weight's own type."""
        rows = self._read(start, stop)
        if self._absmax is None:
            codes, scales, _ = bnb.int8_vectorwise_quant(rows.to(torch.float16))
            return bnb.int8_vectorwise_dequant(codes, scales).to(rows.dtype)
        packed, state = self._pack(rows)
        first = start * rows[0].numel() // BLOCK
        state.absmax = self._absmax[first : first + state.absmax.numel()]
        return bnb.dequantize_4bit(packed, state).reshape(-1)[: rows.numel()].reshape(rows.shape)

    def _pack(self, rows: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
        # As rows of one block each (zeros do not move a maximum): bitsandbytes' CPU kernel gives wrong values where a
        # row does not end with a block, its GPU kernels do not care.
        flat = torch.nn.functional.pad(rows.reshape(-1), (0, -rows.numel() % BLOCK)).view(-1, BLOCK)
        kind = self._section.bnb_4bit_quant_type
        return bnb.quantize_4bit(flat, blocksize=BLOCK, compress_statistics=False, quant_type=kind)

    def _four_bit_absmax(self, blocks: Iterable[tuple[int, int]]) -> torch.Tensor:
        absmax = torch.cat([self._pack(self._read(start, stop))[1].absmax for start, stop in blocks])
        if not self._section.bnb_4bit_use_double_quant:
            return absmax
        offset = absmax.mean()
        codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
        return bnb.dequantize_blockwise(codes, state) + offset
