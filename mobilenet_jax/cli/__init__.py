"""What commands share: config files, flags, exit codes, and the start of a process."""
