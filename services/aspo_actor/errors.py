"""What an engine raises."""

from __future__ import annotations

from aspo.errors import AspoError


class EngineError(AspoError, RuntimeError):
    """The engine did not start, is dead or hung, or lost its weights; its text is one line."""

    exit_code = 1


class WeightsRefusedError(AspoError, ValueError):
    """An update that does not fit the model or its weights, which are as they were before."""


class NotFiniteError(EngineError):
    """Log-probs that no sound weights give."""
