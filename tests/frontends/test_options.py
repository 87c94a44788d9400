"""Options as a framework hands them over, and from the environment."""

import pytest

from llmir.frontends.common.options import OptionError, Options

WHERE = """--options '{"workload": "chat"}'"""


def test_nothing_said_is_the_default() -> None:
    assert Options.read({}, {"PATH": "/bin", "LLMIR_CACHE": "/tmp"}, WHERE) == Options()


def test_both_ways_lead_to_the_same_field() -> None:
    assert Options.read({"workload": "chat"}, {}, WHERE) == Options.read({}, {"LLMIR_WORKLOAD": "chat"}, WHERE)


def test_the_command_line_wins() -> None:
    assert Options.read({"workload": "chat"}, {"LLMIR_WORKLOAD": "long"}, WHERE).workload == "chat"


@pytest.mark.parametrize(("said", "shared"), [("", True), ("on", True), ("off", False)])
def test_prefixes_are_shared_unless_that_is_off(said: str, shared: bool) -> None:
    assert Options.read({"prefix_sharing": said}, {}, WHERE).shares_prefixes is shared
    assert Options.read({}, {"LLMIR_PREFIX_SHARING": said}, WHERE).shares_prefixes is shared


#: What Kubernetes sets for a service of two ports that is called llmir; the second port has no name in some.
SERVICE = {
    "LLMIR_SERVICE_HOST": "10.0.0.7",
    "LLMIR_SERVICE_PORT": "8000",
    "LLMIR_SERVICE_PORT_HTTP": "8000",
    "LLMIR_SERVICE_PORT_HTTP_METRICS": "9000",
    "LLMIR_PORT": "tcp://10.0.0.7:8000",
    "LLMIR_PORT_8000_TCP": "tcp://10.0.0.7:8000",
    "LLMIR_PORT_8000_TCP_PROTO": "tcp",
    "LLMIR_PORT_8000_TCP_PORT": "8000",
    "LLMIR_PORT_8000_TCP_ADDR": "10.0.0.7",
    "LLMIR_PORT_53_UDP": "udp://[fd00::7]:53",
    "LLMIR_PORT_53_UDP_ADDR": "fd00::7",
}


@pytest.mark.parametrize("service", ["LLMIR", "LLMIR_CHAT", "LLMIR_WORKLOAD", "LLMIR_7B_V2"])
def test_where_a_service_is_is_no_option(service: str) -> None:
    environment = {name.replace("LLMIR", service): value for name, value in SERVICE.items()}
    assert Options.read({}, {**environment, "LLMIR_WORKLOAD": "chat"}, WHERE) == Options(workload="chat")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("LLMIR_PORT", "8000"), ("LLMIR_SERVICE", "10.0.0.7"), ("LLMIR_SERVICE_PORT", "x"), ("LLMIR_HOST", "10.0.0.7")],
)
def test_what_only_looks_like_a_service_is_refused(variable: str, value: str) -> None:
    with pytest.raises(OptionError, match=f"no option '{variable}'"):
        Options.read({}, {variable: value}, WHERE)


@pytest.mark.parametrize(
    ("given", "environment", "hint"),
    [
        ({"wrokload": "chat"}, {}, "did you mean 'workload'"),
        ({"prefix_sharing": "maybe"}, {}, "option 'prefix_sharing' is on or off, not 'maybe'"),
        ({}, {"LLMIR_PREFIX_SHARING": "0"}, "option 'prefix_sharing' is on or off, not '0'"),
        ({}, {"LLMIR_WORKLAOD": "chat"}, "did you mean 'LLMIR_WORKLOAD'"),
        ({"zzz": "chat"}, {}, "known are workload, target, plan, prefix_sharing"),
        ({"workload": 3}, {}, "takes text"),
        ("chat", {}, "must be an object, not 'chat': write --options"),
    ],
)
def test_what_is_no_option_is_refused(given: object, environment: dict, hint: str) -> None:
    with pytest.raises(OptionError, match=hint):
        Options.read(given, environment, WHERE)
