"""Contracts, as tests: what every implementation of a part has to pass, here or in a package of its own.

sources.py  a source of backbones: ``backbones/from_<library>.py``
"""
