"""Every error that edgeprune raises on purpose, and the exit code that it ends a command with.

EdgepruneError                 something the user can act on; the message says what to do next
  UsageError            (2)    a wrong option, key or value
    ConfigError                edgeprune.toml: an unknown key, a value that is not allowed
    ModelError                 a model that does not load, or does not fit its weights or input
    DataError                  a data set that is missing, empty, corrupt, or does not fit the model
    RunError                   a run folder that belongs to another model, or is damaged
    TableError                 a latency table that is damaged, or does not hold what was asked
  TraceError            (2)    a network that cannot be run on channel identities
  SurgeryError          (2)    a cut that would leave nothing, or does not belong to this network
  BudgetError           (2)    a budget that makes no sense
    UnreachableBudget   (1)    a budget that this device cannot reach, with the floor
  MissedError           (1)    the finished network misses its budget or its accuracy floor
  WorkerError           (3)    a process that judges candidates died again and again
  TargetError           (3)    a target that cannot be reached, or does not work
    LinkError                  the link to a device broke, or cannot be made now
    RuntimeMissing             the runtime a target needs is not installed
    AgentError                 the program on the device died, hung or answered nonsense
  DeployError           (3)    an installation that failed; what was installed before still stands
"""

from __future__ import annotations


class EdgepruneError(Exception):
    """The root: str(error) is a message for the user, `exit_code` what the command ends with."""

    exit_code = 2


class UsageError(EdgepruneError):
    pass


class ConfigError(UsageError):
    pass


class ModelError(UsageError):
    pass


class DataError(UsageError):
    pass


class RunError(UsageError):
    pass


class TableError(UsageError):
    pass


class TraceError(EdgepruneError):
    pass


class SurgeryError(EdgepruneError):
    pass


class BudgetError(EdgepruneError):
    pass


class UnreachableBudget(BudgetError):
    exit_code = 1


class MissedError(EdgepruneError):
    exit_code = 1


class WorkerError(EdgepruneError):
    exit_code = 3


class TargetError(EdgepruneError):
    exit_code = 3


class LinkError(TargetError):
    pass


class RuntimeMissing(TargetError):
    pass


class AgentError(TargetError):
    pass


class DeployError(EdgepruneError):
    exit_code = 3
