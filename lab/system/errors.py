"""Errors for users: one line per problem, without a traceback."""

LONGEST = 5000  # characters of a line; a path has up to 4096


def printable(text: str) -> str:
    """The text as one line, with escapes for characters that a terminal would not show, or obey.

    Messages quote names and contents of files that others made.
    """
    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """Something that the user can fix: one line per problem, no traceback, exit code 2."""

    def __init__(self, *problems: str):
        super().__init__(*map(printable, problems))

    @property
    def problems(self) -> tuple[str, ...]:
        """The problems, one line each."""
        return self.args

    def __str__(self) -> str:
        return "\n".join(self.args)


class ConfigError(UserError):
    """The configuration is not usable."""


class DataError(UserError):
    """The data are missing, damaged or do not suit the configuration."""


class StorageError(UserError):
    """The disk is full, read-only, or may not be written to."""
