"""The errors a user can cause. Everything else that goes wrong is ours and is an assertion or a plain exception."""


class UserError(ValueError):
    """Something outside the program is wrong; the message says what, where, and the way out."""


class ConfigError(UserError):
    """One or more settings are wrong; the message has one line per problem."""


class DataError(UserError):
    """A data file, record or image is wrong; the message names file, line and field."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or does not fit the model."""


class TrainingError(UserError):
    """A run has met what it may not go on after by itself: its settings and files are in order, and starting it again is for whoever
    has looked (exit code 3, not 2)."""
