"""Selecting latents of a run: by ids, or by an expression over their columns such as `label == 3`."""

import ast
import hashlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc

from palindrome.pipeline.base.text import error_message
from palindrome.pipeline.storage.folder import options_for

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda column, values: column.isin(values),
    ast.NotIn: lambda column, values: ~column.isin(values),
    ast.Is: lambda column, _: column.is_null(),
    ast.IsNot: lambda column, _: ~column.is_null(),
}


@dataclass(frozen=True)
class Selection:
    """The rows with one of the `ids` (None: any) for which `where` is true (None: all)."""

    ids: tuple[str, ...] | None = None
    where: str | None = None

    def expression(self, schema: pa.Schema) -> pc.Expression | None:
        """The filter for pyarrow's readers, which skip row groups by it; None for all rows. Raises ValueError."""
        parts = [] if self.ids is None else [pc.field("image_id").isin(pa.array(self.ids, pa.string()))]
        parts += [] if self.where is None else [parse(self.where, schema)]
        return reduce(operator.and_, parts) if parts else None

    @property
    def ids_digest(self) -> str | None:
        """A digest of the set of ids, None without ids. A resumed run must have the same."""
        return None if self.ids is None else hashlib.sha256("\n".join(sorted(self.ids)).encode()).hexdigest()


def listed_ids(uri: str) -> tuple[str, ...]:
    """The ids in a file with one per line, without duplicates. Raises OSError and ValueError."""
    with fsspec.open(uri, "rb", **options_for(uri)) as file:
        found = tuple(dict.fromkeys(filter(None, file.read().decode("utf-8-sig").splitlines())))
    if not found:
        raise ValueError(f"{uri} has no ids")
    return found


def parse(text: str, schema: pa.Schema) -> pc.Expression:
    """Parses Python's comparisons, `in`, `is None`, `and`, `or`, `not` and parentheses over the columns. Raises
    ValueError naming the part at fault."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as e:
        raise ValueError(f"{text!r} is not an expression") from e

    def truth(node: ast.expr) -> pc.Expression:
        if isinstance(node, ast.BoolOp):
            return reduce(operator.and_ if isinstance(node.op, ast.And) else operator.or_, map(truth, node.values))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~truth(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = zip(sides, node.ops, sides[1:], strict=False)
            return reduce(operator.and_, [_compared(left, op, right) for left, op, right in pairs])
        if isinstance(node, ast.Name) and pa.types.is_boolean(_column(node).type):
            return pc.field(node.id)
        raise ValueError(f"{ast.unparse(node)!r} is not true or false")

    def _compared(left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot) and not (isinstance(right, ast.Constant) and right.value is None):
            raise ValueError(f"{ast.unparse(right)!r} is not None, which `is` requires")
        if isinstance(op, ast.In | ast.NotIn | ast.Is | ast.IsNot):
            if not isinstance(left, ast.Name):
                raise ValueError(f"{ast.unparse(left)!r} is not a column")
            _column(left)
            return COMPARISONS[type(op)](pc.field(left.id), _constant(right))
        return COMPARISONS[type(op)](value(left), value(right))

    def value(node: ast.expr) -> pc.Expression:
        if isinstance(node, ast.Name):
            return pc.field(_column(node).name)
        return pc.scalar(_constant(node))

    def _column(node: ast.Name) -> pa.Field:
        if node.id not in schema.names or node.id == "latent":
            others = ", ".join(name for name in schema.names if name != "latent")
            raise ValueError(f"{node.id!r} is not a column; the columns are {others}")
        return schema.field(node.id)

    found = truth(tree)
    try:
        schema.empty_table().filter(found)  # raises if types can't be compared
    except pa.ArrowException as e:
        raise ValueError(f"{text!r}: {error_message(e)}") from e
    return found


def _constant(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)!r} is neither a column nor a value") from None
