"""The errors that are for people: told in one line a problem, without a traceback."""


class UserError(Exception):
    """What the user can fix: one line a problem, no traceback, exit code 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class ConfigError(UserError):
    """The configuration is not usable."""


class DataError(UserError):
    """The data are missing, damaged or do not suit the configuration."""


class StorageError(UserError):
    """The disk is full, read-only, or may not be written to."""
