"""The error classes. Each message is one line: the field or file, its value, and the remedy."""


class NanokvError(Exception):
    """Base of all errors of nanokv."""


class ConfigError(NanokvError, ValueError):
    """An option of EngineConfig that is not valid, or not possible with this model or machine."""


class RequestError(NanokvError, ValueError):
    """A request that cannot be served. The engine and all other requests go on."""


class CheckpointError(NanokvError):
    """A model folder that is incomplete, malformed or of an unsupported family."""


class PullError(NanokvError):
    """Weights that could not be fetched, verified or written."""


class CacheError(NanokvError):
    """The cache contradicts itself about an owner, a lock or a page. Always a bug in nanokv."""


class CodecError(NanokvError, ValueError):
    """Keys or values that the codec cannot write: they are not finite, or beyond the range of a scale."""


class CourseError(NanokvError):
    """A course, an exercise or a student's file that cannot be used."""


class ExerciseTODO(NanokvError, NotImplementedError):
    """Raised by the empty body of an exercise: ExerciseTODO("02.1")."""

    def __init__(self, exercise_id: str) -> None:
        super().__init__(f"exercise {exercise_id} is still to do: nanokv learn start {exercise_id}")
        self.exercise_id = exercise_id
