"""The root of the errors that a user can mend."""

from __future__ import annotations


class AspoError(Exception):
    """Something the user can mend; the text is one line that says what is wrong and what to do."""

    exit_code = 2  # of the command it ends; 1 where a part failed that the user did not ask wrongly
