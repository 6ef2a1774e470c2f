"""What went wrong while reading a video, in one sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Damage:
    """Counts what a reader had to skip.

    Attributes:
        pieces: packets that did not decode, and frames that the decoder had to patch.
        stop_reason: why reading stopped before the end; empty if it did not.
    """

    pieces: int = 0
    stop_reason: str = ""

    def complaint(
        self, start_seconds: float, end_seconds: float, duration_seconds: float | None, frame_seconds: float
    ) -> str:
        """Return what to add to the video's name, once it has been read to its end; empty if all was well.

        Args:
            start_seconds: time of the first frame.
            end_seconds: end of the last frame that decoded.
            duration_seconds: length that the header promises; None if it promises nothing.
            frame_seconds: usual length of a frame.
        """
        # Headers round, and sound may outlast the pictures a little: only a real gap is worth a warning.
        tolerance = max(1.0, 4 * frame_seconds)
        short = duration_seconds is not None and end_seconds < start_seconds + duration_seconds - tolerance
        skipped = f"{self.pieces} damaged packets or frames were skipped or patched" if self.pieces else ""
        if not short and not self.stop_reason:
            return f": {skipped}" if skipped else ""
        promised = "" if duration_seconds is None else f" of {duration_seconds:.1f} s"
        causes = [self.stop_reason or "the rest is missing or damaged", skipped]
        return f" ends at {end_seconds - start_seconds:.1f} s{promised}: {'; '.join(filter(None, causes))}"
