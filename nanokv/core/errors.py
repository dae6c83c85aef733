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


class CodecError(NanokvError, ValueError):
    """Keys or values that the chosen codec cannot write: they are not finite, or beyond what a scale holds."""


class CourseError(NanokvError):
    """A course, an exercise of it or a student's file that cannot be used as it is."""


class ExerciseTODO(NanokvError, NotImplementedError):
    """Stands where an exercise waits for its solution: ExerciseTODO("02.1")."""

    def __init__(self, exercise_id: str) -> None:
        super().__init__(f"exercise {exercise_id} is still to do: nanokv learn start {exercise_id}")
        self.exercise_id = exercise_id
