"""Hold float32 products at full precision for the duration of an operator.

A caller may have allowed TF32 on the GPU or bfloat16 on the CPU, for the sake of a model's
forward pass. An inverse of a matrix of condition 1e6 made with products of 10 bits is noise.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# torch 2.9 gave every backend its own setting, inherited from the whole backend and that from
# "generic", beside the older single one. From then on the products look at the new settings alone,
# and asking for the old one raises where a caller has used both: so only the new ones are used.
# There is no public name for a setting's parent, hence torch._C.
BY_BACKEND = hasattr(torch._C, "_set_fp32_precision_setter")
FULL = ("none", "ieee", "highest")  # "none": nobody has asked for less

Setting = tuple[str, str]  # backend and operation
GENERIC: Setting = ("generic", "all")
PRODUCTS: tuple[Setting, ...] = (("cuda", "matmul"), ("mkldnn", "matmul"))
if not BY_BACKEND:
    PRODUCTS = (GENERIC,)

_lock = threading.Lock()
_users = 0
_restore: dict[Setting, str] = {}


def read(setting: Setting) -> str:
    """Return the precision in force, its own or an inherited one."""
    if BY_BACKEND:
        return torch._C._get_fp32_precision_getter(*setting)
    return torch.get_float32_matmul_precision()


def write(setting: Setting, value: str) -> None:
    """Set a precision; "none" inherits."""
    if BY_BACKEND:
        torch._C._set_fp32_precision_setter(*setting, value)
    else:
        torch.set_float32_matmul_precision(value)


def own_value(setting: Setting) -> str:
    """Return what ``setting`` itself is set to: "none" where it inherits what it shows.

    torch tells only what is in force. Where that is also what the parent shows, the parent is
    changed for a moment: what follows it inherits.
    """
    shown = read(setting)
    if setting == GENERIC or shown == "none":
        return shown
    parent = GENERIC if setting[1] == "all" else (setting[0], "all")
    if read(parent) != shown:
        return shown
    before = own_value(parent)
    write(parent, "ieee" if shown != "ieee" else "tf32")
    try:
        return shown if read(setting) == shown else "none"
    finally:
        write(parent, before)


@contextmanager
def full_precision() -> Iterator[None]:
    """Compute float32 products in float32 inside the context, whatever the caller has allowed.

    What was set before is set again at the end, also after an exception. The settings are the
    process's: contexts may be nested and may overlap in several threads, the last one to end
    restores.
    """
    global _users
    with _lock:
        _users += 1
        for setting in PRODUCTS:
            if read(setting) not in FULL:
                _restore[setting] = own_value(setting)
                write(setting, "ieee" if BY_BACKEND else "highest")
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for setting, value in _restore.items():
                    write(setting, value)
                _restore.clear()
