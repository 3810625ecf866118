"""The parts that commands share: config files, flags, exit codes, and the setup of a process."""
