"""What every package uses: errors, JSON, disk, hardware, reads of the device."""
