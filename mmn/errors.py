"""The one exception this package raises on bad input."""


class MmnError(ValueError):
    """Bad input: one sentence that says what was wrong and what to do."""
