"""All single faults of a module: mutmut's operators, and those that it lacks for vectorised code."""

from __future__ import annotations

from collections.abc import Iterator

import libcst as cst
from mutmut.mutation import mutators

# without what only changes messages (strings) or fails on every call (None in place of values)
OF_MUTMUT = {
    "operator_number", "operator_name", "operator_augmented_assignment", "operator_remove_unary_ops",
    "operator_keywords", "operator_swap_op", "operator_if_exp",
}  # fmt: skip
OPPOSITES = (
    ("any", "all"), ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("clamp_min", "clamp_max"),
    ("minimum", "maximum"), ("floor", "ceil"),
)  # fmt: skip
OPPOSITE = dict(OPPOSITES) | {new: old for old, new in OPPOSITES}
TRUE, FALSE = cst.Name("True"), cst.Name("False")
SKIPPED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise, cst.FormattedString)
TYPES = {"dict", "list", "tuple", "type", "set"}
UNSEEN = {"sem"}  # of atomic operations: where no other program runs it changes nothing
UNSWAPPED = {"isinstance", "getattr", "where", "gather", "scatter", "full"}  # they fail on every call
Place = tuple[cst.CSTNode, list[tuple[str, cst.CSTNode]]]


def places(module: cst.Module) -> list[Place]:
    """Every place that can be mutated, with what may stand there instead and what that does."""
    return list(_walk(module))


def mutated(module: cst.Module, node: cst.CSTNode, new: cst.CSTNode) -> str | None:
    """The module's text with a node replaced; None where that is no change or no Python."""
    text = module.deep_replace(node, new).code
    try:
        compile(text, "mutant", "exec")
    except SyntaxError:
        return None
    return None if text == module.code else text


def _walk(module: cst.Module) -> Iterator[Place]:
    imported = {"self", "cls", "super"} | {
        (name.asname.name if name.asname else name.name).value.split(".")[0]
        for line in module.body
        if isinstance(line, cst.SimpleStatementLine)
        for part in line.body
        if isinstance(part, cst.Import | cst.ImportFrom) and not isinstance(part.names, cst.ImportStar)
        for name in part.names
    }

    def walk(node: cst.CSTNode) -> Iterator[Place]:
        if _left_alone(node):
            return
        replacements = [
            (operator.__name__.removeprefix("operator_").replace("_", " "), new)
            for kind, operator in mutators.mutation_operators
            if isinstance(node, kind) and operator.__name__ in OF_MUTMUT
            for new in operator(node)
        ] + list(_ours(node, imported))
        if replacements:
            yield node, replacements
        for child in node.children:
            yield from walk(child)

    return walk(module)


def _left_alone(node: cst.CSTNode) -> bool:
    """Types, messages, and dimensions counted from the last, where a fault fails on every call or changes nothing."""
    if isinstance(node, cst.Subscript):
        return isinstance(node.value, cst.Name) and (node.value.value[0].isupper() or node.value.value in TYPES)
    if isinstance(node, cst.Call):
        return isinstance(node.func, cst.Name) and node.func.value.endswith("Error")
    if isinstance(node, cst.UnaryOperation):
        return isinstance(node.operator, cst.Minus) and isinstance(node.expression, cst.Integer)
    return isinstance(node, SKIPPED)


def _ours(node: cst.CSTNode, imported: set[str]) -> Iterator[tuple[str, cst.CSTNode]]:
    if isinstance(node, cst.If | cst.CompIf):
        yield "condition negated", node.with_changes(test=_negated(node.test))
        yield "condition never holds", node.with_changes(test=FALSE)
    if isinstance(node, cst.BinaryOperation | cst.BooleanOperation):
        yield "right operand dropped", _wrapped(node.left)
        yield "left operand dropped", _wrapped(node.right)
    if isinstance(node, cst.UnaryOperation) and isinstance(node.operator, cst.Minus):
        yield "sign flipped", _wrapped(node.expression)
    if isinstance(node, cst.Call):
        yield from _of_call(node, imported)
    if isinstance(node, cst.SimpleStatementLine) and len(node.body) == 1:
        (only,) = node.body
        if isinstance(only, cst.AugAssign) or (isinstance(only, cst.Expr) and isinstance(only.value, cst.Call)):
            yield "statement deleted", node.with_changes(body=[cst.Pass()])


def _of_call(node: cst.Call, imported: set[str]) -> Iterator[tuple[str, cst.CSTNode]]:
    function = node.func
    name = function.attr if isinstance(function, cst.Attribute) else function
    if isinstance(name, cst.Name) and name.value in OPPOSITE:
        yield "opposite called", node.with_deep_changes(name, value=OPPOSITE[name.value])
    if isinstance(function, cst.Attribute):
        receiver = function.value
        if not (isinstance(receiver, cst.Name) and receiver.value in imported):
            yield "call dropped", receiver
    for at, argument in enumerate(node.args):
        if argument.keyword is not None and argument.keyword.value not in UNSEEN:
            rest = [*node.args[:at], *node.args[at + 1 :]]
            yield "keyword argument dropped", node.with_changes(args=_without_last_comma(rest))
    swaps = isinstance(name, cst.Name) and name.value not in UNSWAPPED
    if swaps and len(node.args) >= 2 and all(one.keyword is None and one.star == "" for one in node.args[:2]):
        first, second = node.args[:2]
        swapped = [first.with_changes(value=second.value), second.with_changes(value=first.value), *node.args[2:]]
        yield "arguments swapped", node.with_changes(args=swapped)


def _without_last_comma(arguments: list[cst.Arg]) -> list[cst.Arg]:
    if not arguments:
        return arguments
    return [*arguments[:-1], arguments[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)]


def _wrapped(node: cst.BaseExpression) -> cst.BaseExpression:
    if isinstance(node, cst.Name | cst.Attribute | cst.Call | cst.Subscript | cst.BaseNumber) or node.lpar:
        return node
    return node.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])


def _negated(node: cst.BaseExpression) -> cst.BaseExpression:
    return cst.UnaryOperation(cst.Not(), _wrapped(node))
