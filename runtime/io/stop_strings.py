"""Stop strings: text that ends an answer and is not part of it."""

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of `stops` appears. Text that may be the beginning of one is held back."""

    def __init__(self, stops: Sequence[str]):
        """Raises ValueError for an empty stop string."""
        if "" in stops:
            raise ValueError("an empty stop string would end every answer at once; remove it")
        self._stops = tuple(stops)
        self._held = ""
        self.reached = False

    def push(self, text: str) -> str:
        """The text that certainly precedes any stop string. Sets `reached` when one is complete."""
        if self.reached:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.reached = True
            passed, self._held = self._held[: min(found)], ""
            return passed
        keep = self._held_back()
        passed, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return passed

    def finish(self) -> str:
        """The rest of the text, when the answer has ended without a stop string."""
        passed, self._held = self._held, ""
        return passed

    def _held_back(self) -> int:
        """Length of the longest suffix of the held text that is a prefix of a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0
