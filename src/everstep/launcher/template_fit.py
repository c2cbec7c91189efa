"""Which of a worker's variables a process forked from the template would not heed: they are read at the start.

By an interpreter, the dynamic linker, libc's allocator, OpenMP and MKL, or torch while it is imported.
"""

from collections.abc import Mapping

READ_AT_START = (
    *("PYTHON", "LD_", "LC_", "LANG", "MALLOC_", "GLIBC_TUNABLES"),
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GOTO_", "BLIS_", "ATEN_", "DNNL_", "ONEDNN_"),
    *("TORCH_", "PYTORCH_", "TORCHINDUCTOR_", "TORCHDYNAMO_"),
)
# Read when a process group is made, or by Everstep.
READ_LATER = ("TORCH_NCCL_", "TORCH_GLOO_", "TORCH_DIST_INIT_", "TORCH_SHARE_RDZV_", "TORCH_FR_")


def differing_variables(of_template: Mapping[str, str], of_worker: Mapping[str, str]) -> frozenset[str]:
    """Names of the variables that matter and have another value, or none, in one of the two."""
    names = {name for name in {*of_template, *of_worker} if name.startswith(READ_AT_START)}
    return frozenset(
        name for name in names if not name.startswith(READ_LATER) and of_template.get(name) != of_worker.get(name)
    )
