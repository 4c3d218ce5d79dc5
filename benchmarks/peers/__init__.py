"""Adapters that run other trainers from their checkouts, with the inputs and settings of a task; used by speed.py."""
