"""Options from vLLM's additional configuration and from the environment."""

import pytest

from llmir.frontends.vllm.options import OptionError, Options


def test_nothing_said_is_the_default() -> None:
    assert Options.read({}, {"PATH": "/bin", "LLMIR_CACHE": "/tmp"}) == Options()


def test_both_ways_lead_to_the_same_field() -> None:
    assert Options.read({"llmir": {"workload": "chat"}}, {}) == Options.read({}, {"LLMIR_WORKLOAD": "chat"})


def test_the_command_line_wins() -> None:
    assert Options.read({"llmir": {"workload": "chat"}}, {"LLMIR_WORKLOAD": "long"}).workload == "chat"


@pytest.mark.parametrize(
    ("additional", "environment", "hint"),
    [
        ({"llmir": {"wrokload": "chat"}}, {}, "did you mean 'workload'"),
        ({}, {"LLMIR_WORKLAOD": "chat"}, "did you mean 'LLMIR_WORKLOAD'"),
        ({"llmir": {"zzz": "chat"}}, {}, "known are workload, target, plan"),
        ({"llmir": {"workload": 3}}, {}, "takes text"),
        ({"llmir": "chat"}, {}, "must be an object"),
    ],
)
def test_what_is_no_option_is_refused(additional: dict, environment: dict, hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        Options.read(additional, environment)
