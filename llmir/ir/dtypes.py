"""The table of element types: by MLIR's names, what each is and what others call it.

Every other name, width or list of element types in llmir is read from here. Needs neither MLIR nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One element type."""

    name: str
    """MLIR's name, and ours."""
    bits: int
    torch: str | None
    """torch's name; None where torch has no such tensors."""
    storage: str | None = None
    """numpy's name of the type that holds its bits, or its values where numpy knows them; None: several in a byte."""
    mantissa: int | None = None
    """Bits of the mantissa that are written down; None for integers."""
    triton: str | None = None
    """Triton's name; None where our GPU kernels have no such tensors."""

    @property
    def rounding(self) -> float:
        """Largest relative error of rounding a number to this type, to nearest; 0 for integers."""
        return 0.0 if self.mantissa is None else 2.0 ** -(self.mantissa + 1)

    def bytes_of(self, count: int) -> int:
        """Bytes of ``count`` elements side by side, whole ones."""
        return -(-count * self.bits // 8)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("f64", 64, "float64", "float64", 52),
        DType("f32", 32, "float32", "float32", 23),
        DType("f16", 16, "float16", "float16", 10, "fp16"),
        DType("bf16", 16, "bfloat16", "uint16", 7, "bf16"),
        DType("f8E4M3FN", 8, "float8_e4m3fn", "uint8", 3, "fp8e4nv"),
        DType("f8E5M2", 8, "float8_e5m2", "uint8", 2),
        DType("f8E8M0FNU", 8, "float8_e8m0fnu", "uint8", 0),
        DType("f4E2M1FN", 4, None, None, 1),
        DType("complex<f32>", 64, "complex64", "complex64", 23),
        DType("i64", 64, "int64", "int64"),
        DType("i32", 32, "int32", "int32"),
        DType("i16", 16, "int16", "int16"),
        DType("i8", 8, "int8", "int8"),
        DType("i4", 4, None),
        DType("ui64", 64, "uint64", "uint64"),
        DType("ui32", 32, "uint32", "uint32"),
        DType("ui16", 16, "uint16", "uint16"),
        DType("ui8", 8, "uint8", "uint8"),
        DType("i1", 1, "bool", "bool"),
    )
}
#: What models run in, and kernels compute queries in.
QUERY_DTYPES = ("bf16", "f16", "f32")
#: What a KV cache may hold as it is, and what with scales beside it.
CACHE_DTYPES = (*QUERY_DTYPES, "f8E4M3FN", "f8E5M2", "i8", "i4")
#: What a quantized weight is stored as.
WEIGHT_STORAGE = ("i4", "i8", "f4E2M1FN", "f8E4M3FN", "f8E5M2")
#: By torch's names.
BY_TORCH: dict[str, DType] = {dtype.torch: dtype for dtype in DTYPES.values() if dtype.torch is not None}
