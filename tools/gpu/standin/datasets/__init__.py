"""The few things that the pocket world's tasks need of `datasets`, for a machine that has no such package.

`run.py` puts this folder last on the path, so that the package itself wins where it is installed; processes that it
starts inherit the path.
"""

from __future__ import annotations


class Dataset:
    """Rows as a list of dictionaries."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    @classmethod
    def from_list(cls, rows: list[dict]) -> Dataset:
        return cls(list(rows))

    @property
    def column_names(self) -> list[str]:
        return list(self.rows[0]) if self.rows else []

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

    def filter(self, keep) -> Dataset:
        return Dataset([row for row in self.rows if keep(row)])


class DatasetDict(dict):
    """{split: rows}"""
