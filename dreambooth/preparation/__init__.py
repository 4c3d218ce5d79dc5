"""Preparation of photos before a run: remarks, captions, masks, and a copy of the photos that a run can train on.

Only the command prepare imports this folder.
"""
