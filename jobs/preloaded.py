"""Imports what takes long: named to the process that workers are forked from."""

from .processes import preload

preload()
