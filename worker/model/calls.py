"""What torch is asked to compute, whoever asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class CallListener(TorchDispatchMode):      # type: ignore[misc]    # of no type that torch declares
    """Hears each call while it is entered."""

    def hear(self, name: str, args: Sequence[Any]) -> None:
        """`name` as torch has it, such as mm or sigmoid_."""
        raise NotImplementedError

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.hear(func.overloadpacket.__name__, args)
        return func(*args, **kwargs or {})
