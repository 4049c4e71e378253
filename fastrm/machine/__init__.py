"""The machine and the other processes: devices, memory, signals, locks, collectives."""
