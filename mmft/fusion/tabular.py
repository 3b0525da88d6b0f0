"""Tables: numbers standardised by the training rows, categories with slots of their own for unknown and missing.

One token per column, as in the FT-Transformer (Gorishniy et al. 2021): a number `x` becomes `z w_j + b_j` with
`z = (x - mean_j) / std_j`, a category a row of an embedding, a missing number a learned vector of its column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from mmft.errors import DataError

MISSING, UNKNOWN, KNOWN = 0, 1, 2
"""Ids of a category: missing, not seen in training, and where the known values begin."""


@dataclass(frozen=True)
class TableSchema:
    """The columns of a table: name -> (mean, std) of the numeric ones, name -> known values of the categorical ones.
    Made from training rows only, and saved in the model's config (`as_config`)."""

    numeric: dict[str, tuple[float, float]]
    categorical: dict[str, tuple[str, ...]]

    @classmethod
    def fit(
        cls, rows: Sequence[Mapping[str, Any]], *, numeric: Sequence[str] = (), categorical: Sequence[str] = ()
    ) -> TableSchema:
        """Mean and population standard deviation (missing values left out; a constant column gets 1), and the sorted
        values as text. Raises DataError for a number that is none, infinite, or a column without any value."""
        numbers: dict[str, tuple[float, float]] = {}
        for name in numeric:
            found = [x for i, row in enumerate(rows) if (x := as_number(row.get(name), f"row {i}, {name}")) is not None]
            if not found:
                raise DataError(f"the numeric column '{name}' has no value in training", do="leave the column out")
            mean = math.fsum(found) / len(found)
            spread = math.sqrt(math.fsum((x - mean) ** 2 for x in found) / len(found))
            # Rounding leaves a constant column with a spread of its last digit.
            numbers[name] = (mean, spread if spread > 1e-12 * max(abs(mean), 1e-300) else 1.0)
        words = {}
        for name in categorical:
            values = {as_word(row.get(name)) for row in rows}
            words[name] = tuple(sorted(word for word in values if word is not None))
        return cls(numbers, words)

    def as_config(self) -> dict[str, Any]:
        """The JSON form that `FusionConfig.table` holds."""
        return {
            "numeric": [{"name": name, "mean": mean, "std": std} for name, (mean, std) in self.numeric.items()],
            "categorical": [{"name": name, "values": list(values)} for name, values in self.categorical.items()],
        }

    @classmethod
    def from_config(cls, table: Mapping[str, Any]) -> TableSchema:
        """Back from `as_config`."""
        return cls(
            {column["name"]: (column["mean"], column["std"]) for column in table["numeric"]},
            {column["name"]: tuple(column["values"]) for column in table["categorical"]},
        )

    def encode(self, rows: Sequence[Mapping[str, Any] | None]) -> dict[str, Tensor]:
        """Inputs of `TabularEncoder`: `numeric` (B, n) standardised, 0 where missing; `missing` (B, n) bool;
        `categories` (B, c) ids. None, NaN and an absent column are missing. Raises DataError for text in a numeric
        column and for infinite numbers."""
        numeric = torch.zeros(len(rows), len(self.numeric))
        missing = torch.ones(len(rows), len(self.numeric), dtype=torch.bool)
        categories = torch.full((len(rows), len(self.categorical)), MISSING)
        places = [{word: KNOWN + at for at, word in enumerate(values)} for values in self.categorical.values()]
        for index, row in enumerate(rows):
            for column, (name, (mean, std)) in enumerate(self.numeric.items()):
                value = as_number((row or {}).get(name), f"row {index}, {name}")
                if value is not None:
                    numeric[index, column], missing[index, column] = (value - mean) / std, False
            for column, name in enumerate(self.categorical):
                word = as_word((row or {}).get(name))
                categories[index, column] = MISSING if word is None else places[column].get(word, UNKNOWN)
        return {"numeric": numeric, "missing": missing, "categories": categories}


def as_number(value: Any, where: str) -> float | None:
    """A number as float; None for None and NaN. Raises DataError for anything else."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Real):
        raise DataError(
            f"{value!r} is not a number", where=where, do="declare the column categorical, or mend the value"
        )
    number = float(value)
    if math.isinf(number):
        raise DataError(
            f"the number is {number}", where=where, allowed="finite numbers, or nothing", do="mend the value"
        )
    return None if math.isnan(number) else number


def as_word(value: Any) -> str | None:
    """A category as text; None for None and NaN. Whole floats lose their point, so that 3.0 (a column that pandas
    widened for a missing value) is 3."""
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return None
    whole = isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer()
    return str(int(value)) if whole else str(value)  # type: ignore[call-overload]


class CategoryTable(nn.Embedding):
    """The embedding of a categorical column; a class of its own because it starts wider than a token table, at the
    length of the other modalities' tokens."""


class TabularEncoder(nn.Module):
    """Columns -> tokens (B, n + c, D); every column is a token, also a missing one, so nothing is masked."""

    def __init__(self, schema: TableSchema, width: int) -> None:
        super().__init__()
        self.width = width
        if schema.numeric:
            shape = (len(schema.numeric), width)
            self.weight, self.bias, self.absent = (nn.Parameter(torch.empty(shape)) for _ in range(3))
        self.embeddings = nn.ModuleList(CategoryTable(KNOWN + len(v), width) for v in schema.categorical.values())

    def forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens and a mask of ones; `inputs` as `TableSchema.encode` gives them."""
        tokens = []
        if hasattr(self, "weight"):
            missing = inputs["missing"]
            # A missing number's content must not matter, whatever it is.
            values = inputs["numeric"].to(self.weight.dtype).masked_fill(missing, 0.0).unsqueeze(-1)
            tokens.append(torch.where(missing.unsqueeze(-1), self.absent, values * self.weight + self.bias))
        for column, table in enumerate(self.embeddings):
            tokens.append(table(inputs["categories"][:, column]).unsqueeze(1))
        joined = torch.cat(tokens, dim=1)
        return joined, torch.ones(joined.shape[:2], dtype=torch.bool, device=joined.device)
