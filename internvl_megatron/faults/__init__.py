"""When a run must end or gets nowhere: signals that ask it to stop, notes of every rank, the watchdog and its report."""
