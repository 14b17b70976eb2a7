"""The run report: what a run folder holds, as one HTML page that needs nothing else. `python -m trainer.report runs/NAME`.

run.py reads a folder, page.py puts the sections together, compare.py sets several runs side by side; every other file is one
section or one kind of picture. Nothing here needs torch, and nothing is imported at this level.
"""
