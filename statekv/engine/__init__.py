"""Streams on a loaded model: sessions, their scheduler and snapshots, and the drop-in `generate`."""
