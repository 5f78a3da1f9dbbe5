"""What `import afnext` gives: every public error, and nothing that is not there."""

import importlib
import pkgutil

import afnext


def test_every_name_of_all_is_there() -> None:
    for name in afnext.__all__:
        assert getattr(afnext, name) is not None
        assert name in dir(afnext)


def test_every_error_of_the_runtime_is_exported() -> None:
    for package in ("kernels", "quant", "runtime"):
        root = importlib.import_module(f"afnext.{package}")
        for module in pkgutil.walk_packages(root.__path__, f"afnext.{package}."):
            if "libafnext" not in module.name:  # a compiled library, not a module
                importlib.import_module(module.name)

    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    errors = {
        error
        for error in below(afnext.AfnextError)
        if error.__module__.startswith(("afnext.kernels", "afnext.quant", "afnext.runtime"))
        and not error.__name__.startswith("_")
    }
    exported = {getattr(afnext, name) for name in afnext.__all__}
    assert {error.__name__ for error in errors - exported} == set()
