"""What the errors of a device and of a model mean, by what they say."""

import re

import torch

from safelatent import errors


class Poisoned(Exception):
    """The device's context is broken: whatever this process asks of it now fails."""


POISON = re.compile(
    "CUDA.*(device-side assert|illegal (memory access|address|instruction)|misaligned address|"
    "unspecified launch failure|uncorrectable|hardware stack error|launch timed out)",
    re.DOTALL,
)
"""Errors that, as the CUDA Runtime API has it, "leave the process in an inconsistent state"."""


def is_poison(error: Exception) -> bool:
    """Whether an error of the device ends its context. Out of memory does not."""
    return isinstance(error, RuntimeError) and POISON.search(str(error)) is not None


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error)


def explain(error: Exception, seed: int, width: int, height: int) -> Exception:
    """A failure of one image alone, in the caller's words."""
    if is_out_of_memory(error):
        return errors.OutOfMemory(
            f"{width} x {height} pixels do not fit in the worker's memory: choose a smaller size"
        )
    if isinstance(error, ValueError):
        return errors.BadNumbers(f"seed {seed}: {error}")
    return error
