"""Finds what the config names as `module:name`, and says in one line what is wrong with it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from aspo.config import ConfigError


def import_callable(setting: str, path: str) -> Callable[..., Any]:
    """Import what `setting` names by `path`; raises ConfigError if it is not there or cannot be called."""
    module_name, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"{setting} {path!r}: {error}; put its folder on PYTHONPATH") from None
    except AttributeError:
        raise ConfigError(f"{setting} {path!r}: module {module_name} has no {name!r}") from None
    except (Exception, SystemExit) as error:  # a user's module may fail in any way as it is imported
        raise ConfigError(f"{setting} {path!r}: importing it raised {error!r}; mend the module") from None
    if not callable(found):
        raise ConfigError(f"{setting} {path!r} is not a plain function")
    function: Callable[..., Any] = found
    return function
