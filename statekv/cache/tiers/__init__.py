"""Where older steps lie: on the device, in the host's memory, on disk, in fewer bits."""
