"""`--cells EXPR`: a small filter over cells, such as `batch <= 8 and runtime == eager`.

Python's own grammar, parsed and never evaluated: field names, literals, bare words, comparisons, and/or/not. Pure.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from bench.cells import Cell
from shortllama.errors import InputError

FIELDS = Cell.__struct_fields__
_EXAMPLE = 'for example "batch<=8 and runtime==eager"'
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda value, among: value in among,
    ast.NotIn: lambda value, among: value not in among,
}

Test = Callable[[Cell], bool]
Value = Callable[[Cell], Any]


def parse(text: str) -> Test:
    """Return the test that `text` describes. Raises InputError for anything but comparisons of fields and literals.

    A bare word that is no field is text: `runtime==eager`. `"ppl" in subject` looks for a part of a name. An order
    comparison needs numbers on both sides.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError):
        raise InputError(f"--cells {text!r} is not an expression; write {_EXAMPLE}") from None
    return _test(tree, text)


def _test(node: ast.expr, text: str) -> Test:
    if isinstance(node, ast.BoolOp):
        parts = [_test(value, text) for value in node.values]
        join = all if isinstance(node.op, ast.And) else any
        return lambda cell: join(part(cell) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _test(node.operand, text)
        return lambda cell: not inner(cell)
    if isinstance(node, ast.Compare):
        return _comparison(node, text)
    raise _refused(node, text)


def _comparison(node: ast.Compare, text: str) -> Test:
    operands = [node.left, *node.comparators]
    if not any(isinstance(part, ast.Name) and part.id in FIELDS for part in operands):
        raise InputError(f"--cells {text!r}: {ast.unparse(node)!r} names no field; fields: {', '.join(FIELDS)}")
    links: list[tuple[Value, Callable[[Any, Any], bool], Value]] = []
    for left, sign, right in zip(operands, node.ops, operands[1:], strict=False):
        if type(sign) not in _COMPARE:
            raise _refused(node, text)
        _check_kinds(left, sign, right, text)
        links.append((_value(left, text), _COMPARE[type(sign)], _value(right, text)))
    return lambda cell: all(compare(left(cell), right(cell)) for left, compare, right in links)


def _check_kinds(left: ast.expr, sign: ast.cmpop, right: ast.expr, text: str) -> None:
    """Refuse what would be always false (batch == eager) or fail on the first cell (subject <= 3)."""
    kinds = (_kind(left, text), _kind(right, text))
    if isinstance(sign, ast.In | ast.NotIn):
        fine = kinds[1] == "list" or kinds == ("text", "text")
    elif isinstance(sign, ast.Eq | ast.NotEq):
        fine = kinds[0] == kinds[1]
    else:
        fine = kinds == ("number", "number")
    if not fine:
        pair = f"{ast.unparse(left)} ({kinds[0]}) with {ast.unparse(right)} ({kinds[1]})"
        raise InputError(f"--cells {text!r} compares {pair}; {_EXAMPLE}")


def _kind(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Tuple | ast.List):
        return "list"
    value = _value(node, text)(_PROBE)
    return "text" if isinstance(value, str) else "number"


def _value(node: ast.expr, text: str) -> Value:
    if isinstance(node, ast.Name):
        return operator.attrgetter(node.id) if node.id in FIELDS else _constant(node.id)
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        return _constant(node.value)
    if isinstance(node, ast.Tuple | ast.List):
        parts = [_value(part, text) for part in node.elts]
        return lambda cell: [part(cell) for part in parts]
    raise _refused(node, text)


def _constant(value: object) -> Value:
    return lambda _cell: value


def _refused(node: ast.expr, text: str) -> InputError:
    return InputError(f"--cells {text!r}: {ast.unparse(node)!r} is not a comparison of fields and values; {_EXAMPLE}")


_PROBE = Cell("", "", "", "", 1, 1, "", 1)
