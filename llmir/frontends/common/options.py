"""What a user can tell llmir when it serves through a framework, from the command line or the environment."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from llmir.errors import LlmirError

#: Environment variables that are llmir's but no options: where compiled things are kept.
OTHER_VARIABLES = frozenset({"LLMIR_CACHE"})
PREFIX = "LLMIR_"
#: What Kubernetes sets in every container of a namespace for a service called llmir, or llmir- and more: names, and of
#: those that an option might have, the values.
_OF_A_SERVICE = re.compile(
    r"LLMIR_(\w+_)?(SERVICE_HOST=|SERVICE_PORT(_\w+)?=\d+$|PORT(_\d+_(TCP|UDP|SCTP))?=(tcp|udp|sctp)://"
    r"|PORT_\d+_(TCP|UDP|SCTP)_(PROTO|PORT|ADDR)=)"
)


class OptionError(LlmirError):
    """An option has an unknown name or a value that it does not take."""


@dataclass(frozen=True)
class Options:
    """One field an option; every field is text, and empty means the default.

    In the environment the option ``workload`` is called ``LLMIR_WORKLOAD``. The command line wins. A leading ``~`` is a
    home folder, which no shell replaces in a configuration.
    """

    workload: str = ""
    """Name or JSON file of the workload that decisions are made for."""
    target: str = ""
    """Name or JSON file of the machine to compile for; the default is this one."""
    plan: str = ""
    """JSON file of a plan that ``llmir compile`` wrote, to be served as it is."""
    prefix_sharing: str = ""
    """Whether a prefix that requests share is read once for all of them where that pays: "on", the default, or "off",
    which also holds for a plan that was made with it on."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether prefix sharing is on."""
        return self.prefix_sharing != "off"

    @classmethod
    def read(cls, given: Any, environment: Mapping[str, str], where: str) -> Options:
        """The options in ``given``, an object of names and texts, and in the environment; raises OptionError.

        ``where``: how ``given`` is written in the framework, by example, for messages.
        """
        names = [field.name for field in fields(cls)]
        values: dict[str, str] = {}
        for variable, value in environment.items():
            if (
                variable.startswith(PREFIX)
                and variable not in OTHER_VARIABLES
                and not _is_of_a_service(variable, value)
            ):
                name = variable.removeprefix(PREFIX).lower()
                _check_name(name, names, variable, [PREFIX + known.upper() for known in names])
                values[name] = value
        if not isinstance(given, Mapping):
            raise OptionError(f"llmir's options must be an object, not {given!r}: write {where}")
        for name, value in given.items():
            _check_name(name, names, name, names)
            if not isinstance(value, str):
                raise OptionError(f"llmir's option {name!r} takes text, not {value!r}")
            values[name] = value
        options = cls(**{name: os.path.expanduser(value) for name, value in values.items()})
        if options.prefix_sharing not in ("", "on", "off"):
            raise OptionError(f"llmir's option 'prefix_sharing' is on or off, not {options.prefix_sharing!r}")
        return options


def _is_of_a_service(variable: str, value: str) -> bool:
    """Whether a variable tells where a Kubernetes service is."""
    return _OF_A_SERVICE.match(f"{variable}={value}") is not None


def _check_name(name: str, names: list[str], spelled: str, known: list[str]) -> None:
    if name not in names:
        close = difflib.get_close_matches(spelled, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        raise OptionError(f"llmir has no option {spelled!r}: {hint}")
