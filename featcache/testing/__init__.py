"""Contracts, as tests: what every implementation of a part has to pass, here or in a package of its own.

executors.py who embeds: ``extraction/executors.py`` and what follows its contract
sources.py   a source of backbones: ``backbones/from_<library>.py``
"""
