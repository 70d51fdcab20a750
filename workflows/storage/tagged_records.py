"""Dataclasses as JSON objects that name their class, such as the lines of a sweep's journal."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any, Generic, TypeVar, get_type_hints

from diffusion.json_values import fits

Record = TypeVar("Record")


class TaggedRecords(Generic[Record]):
    """Converts records of several dataclasses to JSON objects and back.

    Args:
        key: key of the objects under which the name of the class stands.
        classes: the dataclasses by name. Their fields are of types that JSON has.
    """

    def __init__(self, key: str, classes: Mapping[str, type[Record]]) -> None:
        self._key, self._classes = key, classes
        self._names = {each: name for name, each in classes.items()}
        self._hints = {each: get_type_hints(each) for each in classes.values()}

    def name(self, record: Record) -> str:
        """Name of a record's class."""
        return self._names[type(record)]

    def to_tree(self, record: Record) -> dict[str, Any]:
        """Convert a record to a JSON object."""
        return {self._key: self.name(record), **asdict(record)}  # type: ignore[call-overload]

    def from_tree(self, tree: Mapping[str, Any]) -> Record | None:
        """Convert a JSON object to a record; None if it is not one. Keys that no field has are left out."""
        kind = self._classes.get(str(tree.get(self._key)))
        if kind is None:
            return None
        values = {}
        for field in fields(kind):  # type: ignore[arg-type]
            if field.name in tree:
                values[field.name] = tree[field.name]
            elif field.default is MISSING:
                return None
        hints = self._hints[kind]
        return kind(**values) if all(fits(value, hints[name]) for name, value in values.items()) else None
