"""One supervisor a session: attempts, teams of agents, verdicts on hangs and stragglers, restarts."""
