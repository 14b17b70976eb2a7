"""Plan of a run before anything starts: settings and a layout in; memory, arithmetic, traffic and what binds out. No torch."""
