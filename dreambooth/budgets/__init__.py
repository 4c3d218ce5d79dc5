"""The budget of a run on this machine: checked against the plan, and kept while the run goes on.

May import: errors, utils, config, runtime and planner.
"""
