"""How the C library keeps memory that tensors free. Giving it back costs a page fault per 4 kB when it is needed again.

Measured on two EPYC cores, embedded backbone, batch 16: a dense generation takes 1.8 s with freed memory kept, 2.4 s without.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # parameters of glibc's mallopt


def keep_freed_memory() -> None:
    """Makes this process keep freed memory for its next tensors, as PyTorch does on GPUs; no effect without glibc."""
    library = _glibc()
    if library is not None:
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        library.mallopt(_MMAP_MAX, 0)


def release_freed_memory() -> None:
    """Returns freed memory to the system once; no effect without glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
    return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
