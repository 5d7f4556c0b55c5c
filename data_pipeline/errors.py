"""What can go wrong with data: a mistake that the user mends, or one bad sample that is set aside."""

from __future__ import annotations


class DataError(ValueError):
    """The data as a whole cannot be used. The message names the file or key and the mend."""


class BadSample(DataError):
    """One sample cannot be used: it is skipped, counted under `reason` and written to the quarantine.

    reason: a short fixed word to count by (`unreadable_image`, `extreme_aspect`, `media_mismatch` ...).
    detail: what exactly is wrong with this sample.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        # The default would call BadSample(message) with one argument when unpickled in another process.
        return type(self), (self.reason, self.detail)
