"""The few things that the pocket world's tasks need of `datasets`, for a machine that has no such package."""

from __future__ import annotations

import importlib.util
import sys
import types


class Dataset:
    """Rows as a list of dictionaries."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    @classmethod
    def from_list(cls, rows: list[dict]) -> Dataset:
        return cls(list(rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self):
        return iter(self.rows)

    def __getitem__(self, key):
        if isinstance(key, str):
            return [row[key] for row in self.rows]
        return self.rows[key]

    def select(self, indices) -> Dataset:
        return Dataset([self.rows[i] for i in indices])


class DatasetDict(dict):
    """{split: rows}"""


def install_if_missing() -> bool:
    """Puts the stand-in where `import datasets` finds it, unless the package is there; says whether it did."""
    if "datasets" in sys.modules or importlib.util.find_spec("datasets") is not None:
        return False
    module = types.ModuleType("datasets")
    module.Dataset, module.DatasetDict = Dataset, DatasetDict
    sys.modules["datasets"] = module
    return True
