"""What sparse attention costs on a device against dense attention: measured coefficients, and a prediction."""

from dit_sparse.cost.model import Call, at_block, predict
from dit_sparse.cost.table import (
    TABLE_VARIABLE,
    DeviceCosts,
    KernelCosts,
    costs_of,
    device_name,
    read_table,
    user_table,
)

__all__ = [
    "TABLE_VARIABLE",
    "Call",
    "DeviceCosts",
    "KernelCosts",
    "at_block",
    "costs_of",
    "device_name",
    "predict",
    "read_table",
    "user_table",
]
