"""Errors a user can act on; the command line prints them as one sentence, exit 2."""


class PipelineError(Exception):
    """Base of every error that is the input's fault, not the program's."""


class SpecError(PipelineError, ValueError):
    """A spec or configuration is wrong; the message names the key."""


class DataError(PipelineError, ValueError):
    """A dataset is unreadable or inconsistent; the message names file and sample."""


class CheckpointError(PipelineError, ValueError):
    """A model file lacks something or belongs to another model."""


class ContractError(PipelineError, ValueError):
    """A teacher does not keep what it declares; the message says by how much."""


class StoreError(PipelineError, RuntimeError):
    """A store cannot be used as asked; the message names the way out."""


class DamagedStoreError(StoreError):
    """Bytes on disk are not the bytes that were written."""


class BusyError(StoreError):
    """Another process is writing what was to be written."""


class WorkersError(PipelineError, RuntimeError):
    """The processes that should do the work are gone or cannot do it."""


class DeviceError(PipelineError, RuntimeError):
    """A device failed or is too small; the message says at what."""
