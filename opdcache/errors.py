"""Every error that users meet, as one tree.

::

    OpdcacheError             OPD000  exit 1
    ├── UsageError            OPD100  exit 2   the user's input; nothing was started
    │   ├── ConfigError       OPD101           unknown key, wrong type, contradiction
    │   ├── PromptError       OPD102           source missing, empty, malformed row
    │   ├── ModelError        OPD103           missing, incomplete, of another kind
    │   ├── TokenizerMismatch OPD104           models do not share token ids
    │   ├── LossError         OPD105           a loss lacks a stored column
    │   ├── RunChanged        OPD106           the run file is not what the run began with
    │   └── NotInstalled      OPD107           an optional package is not there
    ├── StoreError            OPD200  exit 1   storage refused or lost something
    │   ├── ObjectMissing     OPD201           an object that should be there is not
    │   ├── StoreFull         OPD202           no space left
    │   ├── StoreUnavailable  OPD203  exit 75  a fault that may pass
    │   └── NotAllowed        OPD204           the store does not let this user
    ├── IntegrityError        OPD300  exit 3   what is stored is not what was committed
    │   ├── ChecksumMismatch  OPD301
    │   ├── UnknownSchema     OPD302           written by a later version
    │   └── InvalidShard      OPD303           contents contradict the format
    └── StageError            OPD400  exit 1   a stage could not do its work
        ├── InputsMissing     OPD401  exit 75  an earlier stage is not done
        ├── EngineError       OPD402           an engine gave something unusable
        ├── Interrupted       OPD403  exit 75  stopped on request; run again to go on
        ├── Held              OPD404  exit 75  another process is at it
        ├── Unanswered        OPD405  exit 75  a served teacher does not answer
        ├── BudgetSpent       OPD406           the run may send no more teacher tokens
        ├── RankLost          OPD407  exit 75  another rank of the learner ended
        ├── ShardsFailed      OPD408           shards failed again and again
        ├── LauncherError     OPD409           a scheduler refuses a job, or is not there
        └── EngineLost        OPD410  exit 75  this process can no longer use its device

Codes are append-only. A message is one line: where, what, expected and found, what to
do next.
"""


class OpdcacheError(Exception):
    """Base of the tree. ``str(error)`` is the whole one-line message.

    Args:
        what: what is wrong, as a sentence without a full stop.
        where: the place: a file and line, an object's path, a shard key and row.
        expected: what should have been there.
        got: what was there instead.
        remedy: what the reader can do next.

    Attributes:
        commit: path of the manifest of the shard that is at fault, when one is.
    """

    code = "OPD000"
    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what, self.where, self.expected, self.got = what, where, expected, got
        self.remedy = remedy
        self.commit: str | None = None
        message = what if where is None else f"{where}: {what}"
        if expected is not None or got is not None:
            parts = [("expected", expected), ("got", got)]
            said = ", ".join(f"{name} {value}" for name, value in parts if value is not None)
            message += f" ({said})"
        if remedy is not None:
            message += f"; {remedy}"
        super().__init__(" ".join(message.split()))

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle by message and fields, so that errors cross process boundaries whole."""
        return _rebuild, (type(self), self.args[0], self.__dict__)


def _rebuild(kind: type[OpdcacheError], message: str, fields: dict[str, object]) -> OpdcacheError:
    error = kind.__new__(kind)
    error.args = (message,)
    error.__dict__.update(fields)
    return error


class UsageError(OpdcacheError):
    """The user's input is wrong; nothing was started."""

    code = "OPD100"
    exit_code = 2


class ConfigError(UsageError):
    """The run file has an unknown key, a wrong type or contradicting values."""

    code = "OPD101"


class PromptError(UsageError):
    """A file of prompts or rollouts, or another source, is missing, empty or malformed."""

    code = "OPD102"


class ModelError(UsageError):
    """A model folder is missing, incomplete or of an unsupported kind."""

    code = "OPD103"


class TokenizerMismatch(UsageError):
    """Teacher and student do not share token ids."""

    code = "OPD104"


class LossError(UsageError):
    """A loss is meaningless, or needs a column that is not stored."""

    code = "OPD105"


class RunChanged(UsageError):
    """The run file no longer says what the run began with."""

    code = "OPD106"


class NotInstalled(UsageError):
    """An optional package that the input asks for is not installed."""

    code = "OPD107"


class StoreError(OpdcacheError):
    """Storage refused or lost something."""

    code = "OPD200"


class ObjectMissing(StoreError):
    """An object that a manifest names is not there."""

    code = "OPD201"


class StoreFull(StoreError):
    """No space is left where the store writes."""

    code = "OPD202"


class StoreUnavailable(StoreError):
    """A fault of the store that may pass."""

    code = "OPD203"
    exit_code = 75


class NotAllowed(StoreError):
    """The store does not let this user do that."""

    code = "OPD204"


class IntegrityError(OpdcacheError):
    """What is stored is not what was committed."""

    code = "OPD300"
    exit_code = 3


class ChecksumMismatch(IntegrityError):
    """An object's bytes do not have the manifest's SHA-256."""

    code = "OPD301"


class UnknownSchema(IntegrityError):
    """A shard was written by a later, incompatible version of the format."""

    code = "OPD302"


class InvalidShard(IntegrityError):
    """A shard's contents contradict the format."""

    code = "OPD303"


class StageError(OpdcacheError):
    """A stage could not do its work."""

    code = "OPD400"


class InputsMissing(StageError):
    """An earlier stage of the round is not done."""

    code = "OPD401"
    exit_code = 75


class EngineError(StageError):
    """An engine gave something unusable."""

    code = "OPD402"


class Interrupted(StageError):
    """The stage was asked to stop; the same command goes on where it stopped."""

    code = "OPD403"
    exit_code = 75


class Held(StageError):
    """Another process is doing this work, which only one can do at a time."""

    code = "OPD404"
    exit_code = 75


class Unanswered(StageError):
    """A teacher that a server serves does not answer, or says that it is busy."""

    code = "OPD405"
    exit_code = 75


class BudgetSpent(StageError):
    """What is left to score would send more tokens to the teacher than the run may."""

    code = "OPD406"


class RankLost(StageError):
    """Another rank of the learner ended, so that this one cannot go on."""

    code = "OPD407"
    exit_code = 75


class ShardsFailed(StageError):
    """Shards failed again and again, more of them than the run lets pass."""

    code = "OPD408"


class LauncherError(StageError):
    """What was to launch jobs refuses one, or is not there."""

    code = "OPD409"


class EngineLost(StageError):
    """A fault left this process unable to use its device; a new one can."""

    code = "OPD410"
    exit_code = 75
