"""The base class of contracts: promises are methods named `test_…`, and `make` makes the object to test."""

from collections.abc import Callable
from typing import Any
from unittest import SkipTest


class Contract:
    """A class of promises. A subclass overrides `make`, and sets attributes for what the object cannot do."""

    def make(self) -> Any:
        """A new object to test; called by each test."""
        raise NotImplementedError(f"{type(self).__name__} needs `make`")

    @classmethod
    def promises(cls) -> list[str]:
        """The names of the tests."""
        return [name for name in dir(cls) if name.startswith("test_")]


def check(contract: type[Contract], make: Callable[[], Any], **attributes: Any) -> None:
    """Run every test of a contract, with these attributes of the class.

    Raises:
        AssertionError: a promise is broken; the test that found it is in a note.
        TypeError: the contract lacks one of the attributes.
    """
    for name in attributes:
        if not hasattr(contract, name):
            raise TypeError(f"{contract.__name__} has no attribute {name!r}")
    case = type(contract.__name__, (contract,), attributes)()
    case.make = make
    for name in case.promises():
        try:
            getattr(case, name)()
        except SkipTest:
            continue
        except Exception as e:
            e.add_note(f"found by {contract.__name__}.{name}")
            raise
