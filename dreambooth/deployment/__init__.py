"""Deploys models to SageMaker endpoints: chooses an instance, uploads the model, manages the endpoint.

May import planner and the folders that planner may import. Imports neither torch nor AWS libraries when it is imported.
"""
