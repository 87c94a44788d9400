"""float32 to the narrower types of outputs and caches.

A GPU rounds to nearest. Triton's interpreter (seen with 3.6.0, 3.7.1 and 3.9.0) cuts bfloat16 off, and in 8-bit types
loses the carry of a mantissa that is rounded up to the next power of two; so emulated programs round before they
convert.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The least normal number of f8E4M3FN, and a number whose last place in float32 is its least subnormal one, 2**-9.
_LEAST_NORMAL_F8 = tl.constexpr(2.0**-6)
_COARSE = tl.constexpr(1.5 * 2.0**14)
#: Largest finite number of f8E4M3FN.
_MOST_F8 = tl.constexpr(448.0)


@triton.jit
def narrowed(x, element: tl.constexpr, EMULATED: tl.constexpr):
    """float32 ``x`` in the type ``element``: bfloat16 or float16."""
    if EMULATED and element == tl.bfloat16:
        x = _nearest(x, 16)
    return x.to(element)


@triton.jit
def quantized(x, scale, element: tl.constexpr, EMULATED: tl.constexpr):
    """``x`` divided by ``scale`` in f8E4M3FN; beyond its largest number, that number."""
    x = tl.minimum(tl.maximum(x.to(tl.float32) / scale, -_MOST_F8), _MOST_F8)
    if EMULATED:
        x = tl.where(tl.abs(x) < _LEAST_NORMAL_F8, (x + _COARSE) - _COARSE, _nearest(x, 20))
    return x.to(element)


@triton.jit
def _nearest(x, BEYOND: tl.constexpr):
    """float32 ``x`` with the last BEYOND bits of its mantissa rounded away, ties to even.

    Of its 23 bits bfloat16 has all but 16, f8E4M3FN all but 20.
    """
    bits = x.to(tl.int32, bitcast=True)
    bits += (1 << (BEYOND - 1)) - 1 + ((bits >> BEYOND) & 1)
    return (bits >> BEYOND << BEYOND).to(tl.float32, bitcast=True)
