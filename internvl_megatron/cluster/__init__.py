"""Runs as jobs of a SLURM cluster: what is asked for, the job's folder, and SLURM itself."""
