"""Names of the tensor dtypes that may travel."""

import torch

# Quantized tensors carry scales and zero points outside their storage; raw bytes would lose them.
_QUANTIZED = {"qint8", "qint32", "quint8", "quint4x2", "quint2x4"}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _known_dtypes() -> dict[str, torch.dtype]:
    found = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]
    return {dtype_name(d): d for d in found if dtype_name(d) not in _QUANTIZED}


DTYPES: dict[str, torch.dtype] = _known_dtypes()
