"""The settings of a run and of each command: what they are, their defaults, and how they are given.

``fields`` has every setting of a run, each with its type and range; ``kinds`` reads those and refuses what does not
fit. ``config`` puts a run's settings together (:func:`~fastrm.settings.config.build` from Python), ``flags`` reads them
from the command line, ``config_file`` from a file. ``command_line`` reads the flags of any command, ``of_run`` which
run it is on.
"""
