"""Commands for runs by name and for machines: status, logs, cancel, resume, doctor, monitor, profile, plan, sweeps."""
