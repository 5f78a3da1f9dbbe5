"""Fills gaps with silence: compares the time stamps of frames with the length of the audio decoded before them."""

MIN_GAP = 0.1  # seconds; smaller gaps are a codec's delay, rounded time stamps, or drift between two clocks
MIN_GAP_AFTER_DAMAGE = 0.003  # more than the millisecond to which Matroska and ASF round
MAX_CLOCK_START = 60.0  # if all streams start later, the file was cut from a running stream
MAX_BROADCAST_GAP = 60.0  # a larger jump in a transport stream is another program's clock

# Formats with time stamps in the file. In other formats time stamps count the data read, so they show damaged packets
# only. AVI counts chunks, wrongly if their sizes vary, so only its start is used.
_MOV, _MATROSKA, _TRANSPORT = "mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "mpegts"
_START_AT_ZERO = {_MOV, _MATROSKA, "asf", "avi"}
_TIMED = {_MOV, _MATROSKA, "asf", _TRANSPORT, "flac", "ogg"}


class Timeline:
    """Computes the missing silence before each frame of one container. If time steps back, nothing is removed:
    overlapping audio is concatenated."""

    def __init__(self, format: str, start: float | None, *, continues: bool = False):
        """format: FFmpeg's name of the demuxer; start: seconds at which the container's earliest stream starts, if
        stated; continues: the container follows another one, so its start is not silence."""
        self.warnings: list[str] = []
        self.begins_at = 0.0  # the time stamp that counts as the start of the file
        self._format = format
        self._zero: float | None = None  # the time stamp of the first sample, silence included
        self._gaps, self._first_gap, self._filled = 0, 0.0, 0.0
        if continues or format not in {*_START_AT_ZERO, _TRANSPORT}:
            return
        self._zero = start if format == _TRANSPORT else 0.0
        if start is not None and start > MAX_CLOCK_START and format in _START_AT_ZERO:
            self._zero = self.begins_at = start
            self.warnings.append(f"the time stamps begin at {start:.1f} s; times count from there")

    def on_time(self, time: float | None, seconds: float) -> bool:
        """Whether a frame that is neither the first nor after damage surely has no silence before it; see `silence`."""
        return time is None or (self._zero is not None and abs(time - self._zero - seconds) < MIN_GAP)

    def start_at_zero(self) -> None:
        """Treat the time before the first frame as missing audio, not as delay."""
        self._zero = 0.0

    def silence(self, time: float | None, seconds: float, rate: int, *, damaged: bool, said: float) -> int:
        """Samples of silence before a frame.

        time: the frame's time stamp in seconds, or None; seconds: length of this container's audio before it, silence
        included; damaged: packets were skipped before it; said: length of the whole file's audio so far, for the
        warnings.
        """
        if time is None:
            return 0
        if self._zero is None:
            self._zero = time - seconds
        ahead = time - self._zero - seconds
        first = seconds == 0 and not damaged
        if abs(ahead) < (MIN_GAP_AFTER_DAMAGE if damaged else MIN_GAP):
            if first:
                self._zero = time
            return 0
        another_clock = self._format == _TRANSPORT and ahead > MAX_BROADCAST_GAP
        if ahead < 0 or another_clock or not (first or damaged or self._format in _TIMED):
            self._zero += ahead
            if another_clock:
                self.warnings.append(f"the time stamps jump by {ahead:.1f} s at {said:.2f} s; taken as another clock")
            return 0
        if first:
            self.warnings.append(f"the audio starts {ahead:.2f} s after the file; silence stands in front of it")
        elif not damaged:
            self._first_gap = self._first_gap if self._gaps else said
            self._gaps, self._filled = self._gaps + 1, self._filled + ahead
        return round(ahead * rate)

    def all_warnings(self) -> list[str]:
        """All warnings so far."""
        if not self._gaps:
            return self.warnings
        many = f"{self._gaps} gaps in the audio, the first" if self._gaps > 1 else "a gap in the audio"
        return [
            *self.warnings,
            f"{many} at {self._first_gap:.2f} s, by its time stamps; filled with {self._filled:.2f} s of silence",
        ]
