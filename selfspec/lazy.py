"""torch and numpy, imported when something of theirs is first used.

``--help``, ``--cfg job`` and a wrong key ask every option for its settings, and answer without waiting for torch. So
what an option's file imports says ``from selfspec.lazy import torch``; annotations, which are never evaluated there
(``from __future__ import annotations``), take ``Tensor`` from torch itself, under ``TYPE_CHECKING``.
"""

from typing import TYPE_CHECKING

__all__ = ["F", "np", "torch"]

if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
else:
    from importlib import import_module
    from types import ModuleType

    class _Lazy(ModuleType):
        """Stands for a module; what has been looked up once is as near as in the module itself."""

        def __getattr__(self, name: str) -> object:
            value = getattr(import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    np, torch, F = _Lazy("numpy"), _Lazy("torch"), _Lazy("torch.nn.functional")
