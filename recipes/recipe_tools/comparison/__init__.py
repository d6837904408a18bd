"""Learning against forgetting as a grid of scenarios, methods and seeds (see `recipes/compare.py`).

Modules: `scenario` (YAML), `data` (rows and models), `metrics` (what is measured), `runner` (one run), `pool` (several
at once), `measures` (fronts, hypervolume, intervals), `summary` (over seeds) and `report` (tables, figure).
"""
