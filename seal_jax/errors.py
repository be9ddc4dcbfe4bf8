"""Errors that are sentences for a user: the command line prints them and exits with status 2."""


class SealError(ValueError):
    """Something the user gave us is wrong; one sentence naming the file, key or line."""


class Stopped(Exception):
    """The run was asked to stop and has saved what it did; the sentence says how to go on."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, heeded between two records: no program is under way on the devices."""


class SelfEditError(SealError):
    """A self-edit (model output, untrusted) that cannot be applied; the message says why."""
