"""Types of columns that are kept: what of them goes through Python as it is, and which can be read as which."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa

t = pa.types
TEXTS = (t.is_string, t.is_large_string, t.is_string_view)


def is_text(kind: pa.DataType) -> bool:
    return any(is_one(kind) for is_one in TEXTS)


def kept_type(kind: pa.DataType) -> pa.DataType:
    """The type of the latents' column: without dictionaries that `pa.array` can't make."""
    inner = _mapped(kind, lambda d: d.value_type if t.is_dictionary(d) else d)
    simple = t.is_dictionary(kind) and not t.is_nested(kind.value_type) and not t.is_temporal(kind.value_type)
    return kind if simple else inner


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Times and durations as the integers they are: Python's have microseconds, and the years 1 to 9999."""
    return _mapped(kind, _integers)


def _integers(kind: pa.DataType) -> pa.DataType:
    if t.is_dictionary(kind):
        return plain_type(kind.value_type) if t.is_temporal(kind.value_type) else kind
    if t.is_temporal(kind) and not t.is_interval(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    return kind


def _mapped(kind: pa.DataType, change: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """`change` of the types that a nested one is made of."""

    def field(of: pa.Field) -> pa.Field:
        return of.with_type(_mapped(of.type, change))

    if isinstance(kind, pa.BaseExtensionType):
        return kind
    if t.is_map(kind):
        return pa.map_(field(kind.key_field), field(kind.item_field))
    if t.is_struct(kind):
        return pa.struct([field(kind.field(i)) for i in range(kind.num_fields)])
    if t.is_fixed_size_list(kind):
        return pa.list_(field(kind.value_field), kind.list_size)
    for is_one, make in ((t.is_list, pa.list_), (t.is_large_list, pa.large_list)):
        if is_one(kind):
            return make(field(kind.value_field))
    return change(kind)


def values(column: pa.Array) -> list[Any]:
    """As Python has them, such that `pa.array` of them and `kept_type` is the column again."""
    plain = plain_type(column.type)
    return (column if plain == column.type else column.cast(plain)).to_pylist()


def can_be_read_as(found: pa.DataType, kept: pa.DataType) -> bool:
    """Whether a file's column has values of the type that the first file's has: the same, none at all, the same texts
    or vectors otherwise stored, or smaller numbers."""
    found, kept = kept_type(found), kept_type(kept)
    if found == kept or t.is_null(found):
        return True
    found, kept = (kind.value_type if t.is_dictionary(kind) else kind for kind in (found, kept))
    if is_text(found) or is_text(kept):
        return is_text(found) and is_text(kept)
    for are_both in (t.is_signed_integer, t.is_unsigned_integer, t.is_floating):
        if are_both(found) and are_both(kept):
            return found.bit_width <= kept.bit_width
    lists = (t.is_list, t.is_large_list)
    if any(is_list(found) for is_list in lists) and any(is_list(kept) for is_list in lists):
        return can_be_read_as(found.value_type, kept.value_type)
    if t.is_struct(found) and t.is_struct(kept) and found.num_fields == kept.num_fields:
        pairs = zip(found, kept, strict=True)
        return all(a.name == b.name and can_be_read_as(a.type, b.type) for a, b in pairs)
    return found == kept


def same_or_wider(a: pa.DataType, b: pa.DataType) -> pa.DataType:
    """The one of two types that the other's values can be read as; `a` where there is none."""
    return b if can_be_read_as(a, b) and not can_be_read_as(b, a) else a
