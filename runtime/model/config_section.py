"""One JSON object of a configuration, read key by key. Every value is checked, and errors name file and key."""

from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import ConfigError
from ..files import shown


class Section:
    """The values of one JSON object; `file` and `prefix` ("text_config.") locate them in errors.

    A key that is absent or null takes the default; without a default (None) it is an error. A value may have several
    names, the spellings of different generations of configs: those present must agree.
    """

    def __init__(self, values: Mapping[str, Any], file: str, prefix: str = "") -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"{file} must hold a JSON object, not {shown(values)}.")
        self.values = values
        self.file = file
        self.prefix = prefix

    def error(self, key: str, problem: str) -> NoReturn:
        """Raise the ConfigError that says what is wrong with `key`."""
        raise ConfigError(f"{self.file}: {self.prefix}{key} {problem}")

    def find(self, *names: str) -> tuple[str, Any]:
        """The spelling found among `names` and its value, or the first spelling and None."""
        present = [(name, self.values[name]) for name in names if self.values.get(name) is not None]
        for name, value in present[1:]:
            if value != present[0][1]:
                self.error(name, f"is {shown(value)} but {present[0][0]} is {shown(present[0][1])}; keep one of them.")
        return present[0] if present else (names[0], None)

    def integer(self, *names: str, default: int | None = None, low: int = 1, high: int) -> int:
        """An integer in `low..high`; not a bool or float."""
        name, value = self.find(*names)
        value = self._present(name, value, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.error(name, f"is {shown(value)}; expected an integer from {low} to {high}.")
        return value

    def optional_integer(self, name: str, *, default: int | None, low: int = 0, high: int) -> int | None:
        """Like `integer`, but an explicit null means None; only an absent key takes the default."""
        if self.values.get(name, default) is None:
            return None
        return self.integer(name, default=default, low=low, high=high)

    def number(self, *names: str, default: float | None = None, high: float) -> float:
        """A finite number, integer or not, above 0 and at most `high`."""
        name, value = self.find(*names)
        value = self._present(name, value, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= high:
            self.error(name, f"is {shown(value)}; expected a number above 0 and at most {high:g}.")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self._present(name, self.values.get(name), default)
        if not isinstance(value, bool):
            self.error(name, f"is {shown(value)}; expected true or false.")
        return value

    def choice(self, *names: str, among: tuple[str, ...], default: str | None = None) -> str:
        """One of the strings in `among`; this runtime does not support others."""
        name, value = self.find(*names)
        value = self._present(name, value, default)
        if not isinstance(value, str) or value not in among:
            self.error(name, f"is {shown(value)}; this runtime knows {', '.join(among)}.")
        return value

    def section(self, name: str, *, required: bool) -> "Section":
        """The JSON object under `name`; empty if it is optional and absent."""
        value = self._present(name, self.values.get(name), None if required else {})
        if not isinstance(value, Mapping):
            self.error(name, f"is {shown(value)}; expected a JSON object.")
        return Section(value, self.file, f"{self.prefix}{name}.")

    def _present(self, name: str, value: Any, default: Any) -> Any:
        value = default if value is None else value
        if value is None:
            self.error(name, "is missing, and there is no default for it.")
        return value
