"""What a program needs from its machine: errors, files, locks, memory, processes, progress."""
