"""The errors a user sees.

Every one is a single sentence that says what is wrong, where (file, shard, key, field) and what was
expected. The command line prints it and exits with code 2; anything else is a defect of ours and keeps
its traceback.
"""


class ClewError(Exception):
    """Something the user can mend: one clear sentence, exit code 2, no traceback."""


class ConfigError(ClewError):
    """A config that cannot be run; raised before any Ray actor starts."""


class DataError(ClewError):
    """Input that cannot be used: a missing path, an empty corpus, a column of the wrong type."""


def user_error(error: BaseException | None) -> ClewError | None:
    """Return the `ClewError` that caused `error`, or None.

    Ray, torch and pydantic wrap what a worker raises in their own exceptions, so the sentence meant for the
    user may be several causes deep. Ray's task errors hold the original in `cause`; Ray Train's in
    `worker_failures`.
    """
    seen: set[int] = set()
    stack = [error]
    while stack:
        current = stack.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, ClewError):
            return current
        stack += [
            current.__cause__,
            current.__context__,
            getattr(current, "cause", None),
            getattr(current, "_base_exc", None),
        ]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, dict):
            stack += list(failures.values())
    return None
