"""How many bits an element takes, by the name of its dtype."""

BITS = {
    "float64": 64,
    "float32": 32,
    "bfloat16": 16,
    "float16": 16,
    "float8": 8,
    "int8": 8,
    "int4": 4,
}
"""Bits per element. Scales of quantised formats come on top and are not counted."""

_SHORT = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"} | {
    "fp8": "float8",
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
}


def name_dtype(name: str) -> str:
    """Return a dtype's full name: ``"bf16"`` and ``"torch.bfloat16"`` give ``"bfloat16"``.

    Raises:
        ValueError: There is no such dtype here.
    """
    plain = name.strip().lower().removeprefix("torch.")
    full = _SHORT.get(plain, plain)
    if full not in BITS:
        raise ValueError(f"no dtype named {name!r}; expected one of {', '.join(BITS)}")
    return full


def count_bytes(elements: int, dtype: str) -> int:
    """Return the bytes of so many elements, rounded up to a whole byte.

    Raises:
        ValueError: There is no such dtype here.
    """
    return -(-elements * BITS[name_dtype(dtype)] // 8)


def item_bytes(dtype: str) -> int:
    """Return the bytes of one element of a dtype that a model can compute in.

    Raises:
        ValueError: There is no such dtype here, or it is one for storage only.
    """
    bits = BITS[name_dtype(dtype)]
    if bits < 16:
        raise ValueError(
            f"{dtype} can store a cache or weights, but attention does not compute in it; "
            "expected float32, bfloat16 or float16"
        )
    return bits // 8
