"""How people watch a run: figures of every step, boards, lines in the log, samples, events."""
