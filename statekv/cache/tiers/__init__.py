"""Where older steps lie: on the device, in the host's memory, on disk, in fewer bits."""

from __future__ import annotations

from statekv.cache.tiers.base import DeviceTier, HostTier, Tier
from statekv.cache.tiers.disk import DiskTier

# From the top down: a tier that is full hands its oldest block to the next, the last one forgets.
TIERS: tuple[type[Tier], ...] = (DeviceTier, HostTier, DiskTier)
