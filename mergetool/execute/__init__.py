"""Work to folders: conveyor, measures, journal, devices."""

from mergetool.execute.run import compute, run

__all__ = ["compute", "run"]
