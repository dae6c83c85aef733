"""The few error classes. Each message is one line that says what is wrong and what to do."""


class NanokvError(Exception):
    """Base of every error that nanokv raises on purpose."""


class ConfigError(NanokvError, ValueError):
    """A choice in EngineConfig that cannot be honoured."""


class RequestError(NanokvError, ValueError):
    """A request that cannot be served: the engine and all other requests go on."""


class CheckpointError(NanokvError):
    """A model folder that is incomplete, misshapen, foreign or of an unknown family."""


class PullError(NanokvError):
    """Weights that could not be fetched, verified or written."""


class CacheError(NanokvError):
    """The cache's books do not balance. Always a bug in nanokv, never the user's fault."""
