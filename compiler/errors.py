"""The errors of the compiler: what happened, to which weight, what to type next."""

from __future__ import annotations

from collections.abc import Iterable

from scaling.errors import ScalingError

__all__ = ["AlreadyCompiled", "BadGradient", "BadOption", "BadState", "NotAMatrix", "NotExpressible", "NotReady", "NotShardable"]


class AlreadyCompiled(ScalingError):
    """The model's weights or forward already follow a table."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what} a second time would scale it twice\n"
            "  build a new model, or pass init=None for one that is already initialised or trained"
        )


class BadOption(ScalingError, ValueError):
    """An option whose value makes no sense."""

    def __init__(self, option: str, value: object, wanted: str) -> None:
        self.option, self.value = option, value
        super().__init__(f"{option}={value!r}: {wanted}")


class BadGradient(ScalingError, RuntimeError):
    """A gradient the optimizer refuses."""

    def __init__(self, names: Iterable[str], what: str, cure: str) -> None:
        self.names = tuple(names)
        super().__init__(f"{what} gradient of {', '.join(self.names)}\n  {cure}")


class BadState(ScalingError, ValueError):
    """A state dict that is not of this optimizer."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}\n  {cure}; nothing has been loaded")


class NotAMatrix(ScalingError, ValueError):
    """A tensor that a matrix map cannot take."""

    def __init__(self, shape: Iterable[int], what: str, cure: str) -> None:
        self.shape = tuple(shape)
        super().__init__(f"{what} of shape {self.shape}\n  {cure}")


class NotExpressible(ScalingError):
    """A rule that the chosen form of output has no words for."""

    def __init__(self, weight: str, why: str, cure: str) -> None:
        self.weight = weight
        super().__init__(f"weight '{weight}' {why}\n  {cure}")


class NotShardable(ScalingError, NotImplementedError):
    """A way of lying over ranks in which a weight cannot be updated."""

    def __init__(self, weight: str, why: str, cure: str) -> None:
        self.weight = weight
        super().__init__(f"weight '{weight}' {why}\n  {cure}")


class NotReady(ScalingError, RuntimeError):
    """A CUDA graph of the very first step."""

    def __init__(self) -> None:
        super().__init__(
            "a CUDA graph is being captured, but the optimizer has no state yet, which the graph would make anew in every replay\n"
            "  take one step outside of the graph first, with a gradient for every weight"
        )
