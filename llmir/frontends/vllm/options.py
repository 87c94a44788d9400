"""What a user can tell llmir when serving through vLLM, from the command line or the environment."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmir.errors import LlmirError

#: Environment variables that are llmir's but no options: where compiled things are kept.
OTHER_VARIABLES = frozenset({"LLMIR_CACHE"})
PREFIX = "LLMIR_"


class OptionError(LlmirError):
    """An option has an unknown name or a value of the wrong type."""


@dataclass(frozen=True)
class Options:
    """One field an option; every field is text, and empty means the default.

    vLLM hands them over as ``--additional-config '{"llmir": {"workload": "chat"}}'``; in the environment an option is
    called ``LLMIR_WORKLOAD``. The command line wins.
    """

    workload: str = ""
    """Name or JSON file of the workload that decisions are made for."""
    target: str = ""
    """Name or JSON file of the machine to compile for; the default is this one."""
    plan: str = ""
    """JSON file of a plan that ``llmir compile`` wrote, to be served as it is."""

    @classmethod
    def read(cls, additional_config: Mapping[str, Any], environment: Mapping[str, str]) -> Options:
        """The options in vLLM's additional configuration and in the environment; raises OptionError."""
        names = [field.name for field in fields(cls)]
        values: dict[str, str] = {}
        for variable, value in environment.items():
            if variable.startswith(PREFIX) and variable not in OTHER_VARIABLES:
                name = variable.removeprefix(PREFIX).lower()
                _check_name(name, names, variable, [PREFIX + known.upper() for known in names])
                values[name] = value
        given = additional_config.get("llmir", {})
        if not isinstance(given, Mapping):
            raise OptionError(
                f"llmir's part of --additional-config must be an object of options, not {given!r}: "
                f"""write '{{"llmir": {{"workload": "chat"}}}}'"""
            )
        for name, value in given.items():
            _check_name(name, names, name, names)
            if not isinstance(value, str):
                raise OptionError(f"llmir's option {name!r} takes text, not {value!r}")
            values[name] = value
        return cls(**values)


def _check_name(name: str, names: list[str], spelled: str, known: list[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(spelled, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise OptionError(f"llmir has no option {spelled!r}: {hint}")
