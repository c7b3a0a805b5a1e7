"""Plan files: `calibrate` makes one from prompts, `describe` and `draw` show what is in it."""

from dit_sparse.calibrate.describe import describe, layer_table, slot_table, summary
from dit_sparse.calibrate.draw import draw
from dit_sparse.calibrate.quality import Reached, for_error, for_psnr
from dit_sparse.calibrate.run import Calibration, Listener, calibrate

__all__ = [
    "Calibration",
    "Listener",
    "Reached",
    "calibrate",
    "describe",
    "draw",
    "for_error",
    "for_psnr",
    "layer_table",
    "slot_table",
    "summary",
]
