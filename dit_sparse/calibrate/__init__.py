"""Plan files: `calibrate` makes one from prompts."""

from dit_sparse.calibrate.run import Calibration, Listener, calibrate

__all__ = ["Calibration", "Listener", "calibrate"]
