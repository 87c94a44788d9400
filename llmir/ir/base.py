"""What types, attributes and ops of the ``llm`` dialect have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmir.ir.bindings import ext, ir


class LLM(ext.Dialect, name="llm"):  # type: ignore[call-arg]  # ext.py is untyped
    """What a decoder executes: one op a framework layer, weights as symbols, the KV cache as a type."""


# ext.py makes these three at run time, out of a type checker's sight.
_Type: Any = LLM.Type
_Attribute: Any = LLM.Attribute
_Operation: Any = LLM.Operation


class LLMType(_Type):
    """A type whose parameters read as the attributes they are; ext.py leaves them all plain ``Attribute``."""

    if TYPE_CHECKING:

        def __init_subclass__(cls, *, name: str, traits: list[Any] | None = None) -> None: ...

    @property
    def params(self) -> list[ir.Attribute]:
        """The parameters, in the order of the class's fields."""
        return [parameter.maybe_downcast() for parameter in super().params]


class LLMAttribute(_Attribute):
    """An attribute whose parameters read as the attributes they are."""

    if TYPE_CHECKING:

        def __init_subclass__(cls, *, name: str, traits: list[Any] | None = None) -> None: ...

    @property
    def params(self) -> list[ir.Attribute]:
        """The parameters, in the order of the class's fields."""
        return [parameter.maybe_downcast() for parameter in super().params]


class InvalidIRError(ValueError):
    """An invariant does not hold; raised inside a verifier it becomes a located MLIR error."""


def require(condition: bool, message: str) -> None:
    """Fail the running verifier with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InvalidIRError(message)


class LLMOp(_Operation):
    """An op whose ``check`` method states its invariants with :func:`require`."""

    if TYPE_CHECKING:

        def __init_subclass__(cls, *, name: str, traits: list[Any] | None = None) -> None: ...

    def check(self) -> None:
        """Raise InvalidIRError where an invariant does not hold."""

    @staticmethod
    def verify_invariants(op: Any) -> bool:
        """MLIR's hook: false, with an error at the op's location, where ``check`` fails.

        It runs before the verifier made from the op's fields, so an op without the right fields passes here
        and fails there.
        """
        if not has_its_fields(op.opview):
            return True
        try:
            op.opview.check()
        except InvalidIRError as error:
            op.location.emit_error(f"'{op.name}' op {error}")
            return False
        return True


def has_its_fields(op: Any) -> bool:
    """Whether an op has the operands, results and attributes its class declares, each of the right kind."""
    for field in type(op)._fields:
        try:
            value = getattr(op, field.name)
        except (KeyError, IndexError, ValueError, TypeError):
            return False
        if value is None or field.constraint is Any:
            continue
        # A boolean is an i1 IntegerAttr to IRDL, but a class of its own in Python.
        allowed = (field.constraint, ir.BoolAttr) if field.constraint is ir.IntegerAttr else field.constraint
        if not isinstance(value if isinstance(field, ext.AttributeDef) else value.type, allowed):
            return False
    return True


def optional_attribute(name: str, kind: type) -> property:
    """A readable property for an attribute that may be absent; IRDL itself knows no optional attributes."""

    def read(op: Any) -> Any:
        if name not in op.attributes:
            return None
        attribute = op.attributes[name]
        require(isinstance(attribute, kind), f"attribute {name!r} must be a {kind.__name__}, but is {attribute}")
        return attribute

    return property(read)


def false_by_default() -> Any:
    """A required boolean attribute: ext.py takes a false BoolAttr for one not given, and asks for a default."""
    return ext.attribute(default_factory=lambda: ir.BoolAttr.get(False))


def shape(value: ir.Value, *, least_rank: int = 1) -> list[int | None]:
    """Shape of a tensor value; None stands for a dimension known only when it runs.

    Raises InvalidIRError for another type, or fewer than ``least_rank`` dimensions.
    """
    kind = value.type
    require(
        isinstance(kind, ir.RankedTensorType) and kind.rank >= least_rank,
        f"operand must be a ranked tensor of at least {least_rank} dimensions, but is {kind}",
    )
    return [None if kind.is_dynamic_dim(i) else kind.get_dim_size(i) for i in range(kind.rank)]


def same_extent(a: int | None, b: int | None) -> bool:
    """Whether two dimensions can be equal; an unknown one fits anything."""
    return a is None or b is None or a == b


def same_shape(a: list[int | None], b: list[int | None]) -> bool:
    """Whether two shapes can be equal."""
    return len(a) == len(b) and all(same_extent(x, y) for x, y in zip(a, b, strict=True))


def known(extent: int | None, what: str) -> int:
    """``extent`` itself, where it must be known when compiling."""
    if extent is None:
        raise InvalidIRError(f"{what} must be known, but is '?'")
    return extent
