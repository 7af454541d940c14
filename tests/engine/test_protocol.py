"""What fulfils a protocol, and what does not; test_engine and test_pipeline ask the engines that DeepSpeed builds."""

import inspect
from typing import Any, Protocol

from megatron_taipan.engine.protocol import Engine


def unfulfilled(engine: Any, protocol: type) -> list[str]:
    """What of a protocol an object lacks: attributes, and methods that do not take the protocol's arguments."""
    found = []
    for base in protocol.__mro__:
        if base in (Protocol, object) or not issubclass(base, Protocol):
            continue
        for name in base.__annotations__:
            if not hasattr(engine, name):
                found.append(f"no attribute {name}")
        for name, member in vars(base).items():
            if name.startswith("_") and name != "__call__":
                continue
            if not hasattr(engine, name):
                found.append(f"no {name}")
            elif inspect.isfunction(member):
                try:
                    takes(getattr(engine, name), list(inspect.signature(member).parameters.values())[1:])
                except TypeError as error:
                    found.append(f"{name}: {error}")
    return found


def takes(method: Any, parameters: list[inspect.Parameter]) -> None:
    """Raises TypeError unless the method can be called with these."""
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    positional = [None for p in named if p.kind is not p.KEYWORD_ONLY]
    inspect.signature(method).bind(*positional, **{p.name: None for p in named if p.kind is p.KEYWORD_ONLY})


class Steps(Protocol):
    rate: float

    def step(self, batch: int, *, last: bool) -> None: ...


class Right:
    rate = 1.0

    def step(self, batches: int, last: bool = False) -> None: ...


class Wrong:
    def step(self, batches: int, final: bool = False) -> None: ...


def test_names_and_arguments_are_asked_for():
    assert unfulfilled(Right(), Steps) == []
    assert unfulfilled(Wrong(), Steps) == ["no attribute rate", "step: got an unexpected keyword argument 'last'"]


def test_a_bare_object_is_no_engine():
    assert not isinstance(object(), Engine)
    assert {"no backward", "no module", "no attribute optimizer"} <= set(unfulfilled(object(), Engine))
