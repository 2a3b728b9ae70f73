"""What goes wrong for a reason that the user can mend. It knows no stage; the entry prints it without a traceback."""


class PrefetchError(Exception):
    """Base of every error whose message says what was wrong, where, what was expected, and what to do."""


class ConfigError(PrefetchError):
    """The command line or a YAML file asks for something that does not exist or does not fit."""


class FormatError(PrefetchError):
    """A file is not what its reader expects."""


class ArtifactError(PrefetchError):
    """Something in the artifact store is damaged, locked, or cannot be made."""
