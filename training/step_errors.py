"""Why a step did not update the model: errors that end the run, raised on all ranks."""

from __future__ import annotations


class StepError(ArithmeticError):
    """A step that must not update the model. Raised on all ranks."""


class NonFiniteStep(StepError):
    """The loss or the gradient norm is infinite or not a number. The model is as it was before the step."""


class NonFiniteWeights(NonFiniteStep):
    """The loss is not finite because weights are not: the samples are not the cause."""


class Spike(StepError):
    """The loss or the gradient norm is far above what it was. The model is as it was before the step."""


class NoSamples(StepError):
    """No sample of the global batch could be read."""


class NothingToLearn(StepError):
    """The global batch has samples, but none of their tokens carries loss."""
