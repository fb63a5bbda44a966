"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where (file, line, field) and what to do.

    The command line prints it as ``error: …`` and exits with code 2; the traceback is shown only under ``--debug``.
    """
